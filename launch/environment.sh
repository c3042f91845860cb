# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: `make_venv DIR [PYTHON]` makes a virtual environment from the lock.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints the first Python of 3.11 or newer; the user's choice comes first.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" > /dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Error: Python 3.11 or newer is needed, and none was found on the PATH." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3 $0 ..." >&2
    return 2
}

# A stamp with the lock's checksum is written last: an interrupted or outdated install starts again.
make_venv() {
    local venv="$1" python="${2:-}" stamp
    stamp="$(cksum < "$root/requirements.lock")"
    if [[ "$(cat "$venv/.lock-stamp" 2> /dev/null)" == "$stamp" ]]; then
        return
    fi
    python="${python:-$(find_python)}" || return 2
    if command -v flock > /dev/null 2>&1; then
        exec 9> "$venv.lock"
        flock 9
        # Another start may have made it while this one waited.
        if [[ "$(cat "$venv/.lock-stamp" 2> /dev/null)" == "$stamp" ]]; then
            exec 9>&-
            return
        fi
    fi
    echo "Making $venv with $("$python" --version) (once, about a minute) ..." >&2
    if command -v uv > /dev/null 2>&1; then
        uv venv --quiet --clear --python "$python" "$venv" &&
            VIRTUAL_ENV="$venv" uv pip install --quiet --require-hashes -r "$root/requirements.lock"
    else
        "$python" -m venv --clear "$venv" &&
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
                --require-hashes -r "$root/requirements.lock"
    fi || {
        echo "Error: installing requirements.lock into $venv failed; see above." >&2
        return 1
    }
    # The project itself, importable from every directory.
    local site
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
    echo "$root" > "$site/jax_config_trainer.pth"
    echo "$stamp" > "$venv/.lock-stamp"
    exec 9>&-
}
