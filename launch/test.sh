#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests: launch/test.sh [--all] [pytest arguments]
# --all adds lint, types, the site of docs/, slow tests, a short run on the newest other Python of this machine,
# and the tests beside PyTorch and on real weights, if these can be had. Without pytest arguments the main
# tests run with all optimizations of the compiler.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_venv "$root/.venv"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

# Tests leave most of the compiler's optimizations out. In a run of all tests these have them, as users' programs do.
optimized=(
    tests/test_configs.py tests/test_trainer.py tests/run/test_exact_resume.py tests/test_loss_curve.py
    tests/parallel/test_memory.py tests/parallel/test_mesh.py
    tests/step/test_train_step.py tests/step/test_custom_step.py tests/step/test_precision_and_loss_scale.py
    tests/step/test_programs.py tests/modes/test_plan.py
)

# A file stays in one process, where its tests share what they train once.
pytest=(python -m pytest -n 2 --dist loadfile --no-loadscope-reorder)

if [[ "${1:-}" != --all ]]; then
    exec "${pytest[@]}" -m 'not slow and not soak' "$@"
fi
shift
ruff check .
ruff format --check .
mypy
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
bash tests/smoke.sh
JAX_DISABLE_MOST_OPTIMIZATIONS=0 bash tests/weights.sh || [[ $? == 3 ]]  # 3: they cannot be had here, which was said.
if [[ $# == 0 ]]; then
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 "${pytest[@]}" -m 'not soak' --budgets=check "${optimized[@]}"
    set -- --budgets=check "${optimized[@]/#/--ignore=}"
fi
exec "${pytest[@]}" -m 'not soak' "$@"
