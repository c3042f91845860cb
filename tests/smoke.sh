#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains, resumes and evaluates MNIST on the newest Python found here that is not .venv's, and so
# mostly on another JAX.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$root"

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}

usual="$(version_of .venv/bin/python || true)"
newest=""
for version in 3.13 3.12 3.11; do
    for candidate in "python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$version".*/bin/python; do
        if [[ -z "$newest" && "$version" != "$usual" && "$(version_of "$candidate")" == "$version" ]]; then
            newest="$(command -v "$candidate")"
        fi
    done
done
if [[ -z "$newest" ]]; then
    echo "smoke: no Python 3.11 to 3.13 besides $usual; nothing to do"
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
grep -q 'resuming from step 20' "$workdir/resumed.txt"
run --config.train_for=40steps --mode=eval | tee "$workdir/eval.txt"
grep -q 'examples 10000' "$workdir/eval.txt"
echo "smoke: passed"
