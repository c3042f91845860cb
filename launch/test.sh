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

optimized=(
    tests/test_configs.py tests/test_trainer.py tests/test_resume.py tests/test_loss_curve.py
    tests/parallel/test_memory.py tests/parallel/test_strategies.py
    tests/step/test_train_step.py tests/step/test_custom_step.py tests/step/test_precision.py
)

if [[ "${1:-}" != --all ]]; then
    exec python -m pytest -m 'not slow and not soak' "$@"
fi
shift
ruff check .
ruff format --check .
mypy
bash tests/smoke.sh
bash tests/weights.sh || [[ $? == 3 ]]  # 3: they cannot be had here, which was said.
python -m pytest -m 'not soak' "$@"
if [[ $# == 0 ]]; then
    # The tests leave most of the compiler's optimizations out; here are programs as users run them.
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest -m 'not soak' "${optimized[@]}"
fi
