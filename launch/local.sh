#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on this machine: launch/local.sh --config=configs/mnist.py [--config.key=value ...]
# The first call creates .venv; the arguments are those of `python -m trainer.main`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# `python -m` looks in the current directory first, and would not say what is wrong.
for file in trainer.py trainer/__init__.py; do
    if [[ -e "$file" && ! "$file" -ef "$root/$file" ]]; then
        echo "Error: $PWD/$file hides this project's package trainer from Python." >&2
        echo "Rename it, or start in a directory without one." >&2
        exit 2
    fi
done
make_venv "$root/.venv"
# A run saves at SIGUSR1. Until it can, in the first moments, the signal would end it.
trap '' USR1 USR2
exec "$root/.venv/bin/python" -m trainer.main "$@"
