#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains, resumes and evaluates MNIST on the newest other Python (and so the newest JAX) found here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$root"

newest=""
for version in 3.13 3.12; do
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python; do
        if [[ -z "$newest" ]] && command -v "$candidate" > /dev/null 2>&1 &&
            "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2> /dev/null; then
            newest="$(command -v "$candidate")"
        fi
    done
done
if [[ -z "$newest" ]]; then
    echo "smoke: no Python 3.12 or newer besides the default one; nothing to do"
    exit 0
fi
make_venv "$root/.venv-smoke" "$newest"
workdir="$(mktemp -d)"
trap 'rm -rf "$workdir"' EXIT
run() {
    .venv-smoke/bin/python -m trainer.main --config=configs/mnist.py --workdir="$workdir/run" \
        --config.checkpoint.every=20steps "$@"
}
.venv-smoke/bin/python -c 'import jax, flax, sys; print("smoke:", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'
run --config.train_for=20steps
run --config.train_for=40steps | tee "$workdir/resumed.txt"
grep -q 'resumed from step 20' "$workdir/resumed.txt"
run --config.train_for=40steps --mode=eval | tee "$workdir/eval.txt"
grep -q 'examples 10000' "$workdir/eval.txt"
echo "smoke: passed"
