#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests: launch/test.sh [--all] [pytest arguments]
# --all adds lint, types, slow tests, a short run on the newest other Python of this machine, and the
# tests beside PyTorch and on real weights, if these can be had.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_venv "$root/.venv"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

if [[ "${1:-}" != --all ]]; then
    exec python -m pytest -m 'not slow and not soak' "$@"
fi
shift
# The default suite leaves most optimizations out; here programs are as users run them.
export JAX_DISABLE_MOST_OPTIMIZATIONS=0
ruff check .
ruff format --check .
mypy
bash tests/smoke.sh
bash tests/weights.sh || [[ $? == 3 ]]  # 3: they cannot be had here, which was said.
exec python -m pytest -m 'not soak' "$@"
