# SPDX-License-Identifier: Apache-2.0
"""The runs whose checkpoints are kept with the tests."""

from __future__ import annotations

import pathlib
from typing import Any

from tests.small import one_device, trainer_in
from trainer.trainer import Trainer

DIRECTORY = pathlib.Path(__file__).resolve().parents[1] / 'golden_runs'
# Where the runs were stopped, and their whole length.
STEPS, TOTAL = 4, 8
_MODEL = {'model__features': (2, 10)}
_NNX = {'model__target': 'trainer.models.mlp_nnx:MLP', 'model__batch_norm': True, **_MODEL}
KINDS: dict[str, dict[str, Any]] = {
    'linen': {**_MODEL, 'optimizer__momentum': 0.9},
    'nnx': _NNX,
    'ensemble': {**_MODEL, 'ensemble': {'size': 2}},
    'float16': {**_MODEL, 'precision': {'compute': 'float16'}},
    'ema': {**_MODEL, 'ema': {'decay': 0.5}},
}


def make_trainer(kind: str, workdir: pathlib.Path) -> Trainer:
    """Returns the trainer of one kind of run."""
    return trainer_in(
        workdir,
        mesh=one_device(),
        **KINDS[kind],
        train_for=f'{TOTAL} steps',
        data__batch_size=16,
        log__every='3 steps',
        evals__test__every='never',
        evals__test__data__batch_size=50,
        log__tensorboard=False,
    )
