#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests: launch/test.sh [--all | --learn] [pytest arguments]
# --all adds lint, types, the documentation site, slow tests, a short run with the newest other Python of this
# machine, and the tests against PyTorch and on real weights, if these are available. Without pytest arguments,
# the main tests run with all compiler optimizations.
# --learn runs only the tests that train for minutes, with all compiler optimizations.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_venv "$root/.venv"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

# Most tests run without most compiler optimizations, which is faster. In a run of all tests these files have
# them, as users' programs do.
optimized=(
    tests/test_configs.py tests/test_trainer.py tests/run/test_exact_resume.py tests/test_loss_curve.py
    tests/parallel/test_memory.py tests/parallel/test_mesh.py
    tests/step/test_train_step.py tests/step/test_custom_step.py tests/step/test_precision_and_loss_scale.py
    tests/step/test_programs.py tests/modes/test_plan.py
)

# All tests of a file run in one process, because they share fixtures that train.
pytest=(python -m pytest -n 2 --dist loadfile --no-loadscope-reorder)

if [[ "${1:-}" == --learn ]]; then
    shift
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 exec "${pytest[@]}" -m learn "$@"
fi
if [[ "${1:-}" != --all ]]; then
    exec "${pytest[@]}" -m 'not slow and not learn and not soak' "$@"
fi
shift
ruff check .
ruff format --check .
mypy
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
bash tests/smoke.sh
JAX_DISABLE_MOST_OPTIMIZATIONS=0 bash tests/weights.sh || [[ $? == 3 ]]  # 3: not available here; the script has printed why.
if [[ $# == 0 ]]; then
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 "${pytest[@]}" -m 'not learn and not soak' --budgets=check "${optimized[@]}"
    set -- --budgets=check "${optimized[@]/#/--ignore=}"
fi
exec "${pytest[@]}" -m 'not learn and not soak' "$@"
