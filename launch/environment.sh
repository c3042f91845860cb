# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: `make_venv DIR [PYTHON]` creates a virtual environment from
# requirements.lock.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Creates DIR, unless it already matches requirements.lock. If two scripts start at the same time, the
# second one waits for the first.
make_venv() {
    local venv="$1" python="${2:-}"
    if is_ready "$venv"; then
        return
    fi
    python="${python:-$(find_python)}" || return 2
    (
        # macOS has no flock: there, two scripts must not create the same environment at once.
        if command -v flock > /dev/null 2>&1; then
            flock 9
        fi
        # Again: another script may have created it while this one waited.
        is_ready "$venv" || install "$venv" "$python"
    ) 9> "$venv.lock"
}

# Prints the path of the first Python of at least 3.11. $PYTHON, the user's choice, is tried first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Error: Python 3.11 or newer is needed, and none was found on the PATH." >&2
    echo "Install one, or set its path: PYTHON=/path/to/python3 $0 ..." >&2
    return 2
}

# Prints what an environment depends on: the path of this checkout, and requirements.lock.
stamp() {
    echo "$root"
    cat "$root/requirements.lock"
}

is_ready() {
    [[ -x "$1/bin/python" ]] && stamp | cmp -s - "$1/stamp"
}

install() {
    local venv="$1" python="$2" site
    echo "Creating $venv with $("$python" --version) (once, about a minute) ..." >&2
    install_with_uv "$venv" "$python" || install_with_pip "$venv" "$python" || {
        echo "Error: installing requirements.lock into $venv failed; see above." >&2
        return 1
    }
    # Makes the project itself importable from every directory.
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    echo "$root" > "$site/jax_config_trainer.pth"
    # Written last, so that an interrupted installation is repeated.
    stamp > "$venv/stamp"
}

install_with_uv() {
    # A version manager may have put a `uv` on the PATH that cannot run.
    uv --version > /dev/null 2>&1 || return 1
    uv venv --quiet --clear --python "$2" "$1" &&
        uv pip install --quiet --python "$1/bin/python" \
            --require-hashes -r "$root/requirements.lock" && return
    echo "uv failed; trying pip ..." >&2
    return 1
}

# Isolated (-I), so that a file in the current directory cannot shadow a module of pip.
install_with_pip() {
    "$2" -I -m venv --clear "$1" &&
        "$1/bin/python" -I -m pip install --quiet --disable-pip-version-check \
            --require-hashes -r "$root/requirements.lock"
}
