#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on this machine: launch/local.sh --config=configs/mnist.py [--config.key=value ...]
# The first call creates .venv; the arguments are those of `python -m trainer.main`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_venv "$root/.venv"
exec "$root/.venv/bin/python" -m trainer.main "$@"
