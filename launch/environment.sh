# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: `make_venv DIR [PYTHON]` makes a virtual environment from the lock.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Makes DIR, unless it is already what the lock says. Two starts at once: the second one waits.
make_venv() {
    local venv="$1" python="${2:-}"
    if is_ready "$venv"; then
        return
    fi
    python="${python:-$(find_python)}" || return 2
    (
        # Where flock is missing (macOS) only the first start has to be alone.
        if command -v flock > /dev/null 2>&1; then
            flock 9
        fi
        is_ready "$venv" || install "$venv" "$python"
    ) 9> "$venv.lock"
}

# Prints the first Python of 3.11 or newer; the user's choice comes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Error: Python 3.11 or newer is needed, and none was found on the PATH." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3 $0 ..." >&2
    return 2
}

# What an environment was made for: this checkout, and this lock.
stamp() {
    echo "$root"
    cat "$root/requirements.lock"
}

is_ready() {
    [[ -x "$1/bin/python" ]] && stamp | cmp -s - "$1/stamp"
}

install() {
    local venv="$1" python="$2" site
    echo "Making $venv with $("$python" --version) (once, about a minute) ..." >&2
    install_with_uv "$venv" "$python" || install_with_pip "$venv" "$python" || {
        echo "Error: installing requirements.lock into $venv failed; see above." >&2
        return 1
    }
    # The project itself, importable from every directory.
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    echo "$root" > "$site/jax_config_trainer.pth"
    # Written last: an interrupted install starts again.
    stamp > "$venv/stamp"
}

install_with_uv() {
    # A version manager may have put a `uv` on the PATH that does not run.
    uv --version > /dev/null 2>&1 || return 1
    uv venv --quiet --clear --python "$2" "$1" &&
        uv pip install --quiet --python "$1/bin/python" \
            --require-hashes -r "$root/requirements.lock" && return
    echo "uv failed; trying pip ..." >&2
    return 1
}

# Isolated (-I), so that no file in the user's directory is taken for a module of pip.
install_with_pip() {
    "$2" -I -m venv --clear "$1" &&
        "$1/bin/python" -I -m pip install --quiet --disable-pip-version-check \
            --require-hashes -r "$root/requirements.lock"
}
