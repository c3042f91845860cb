# SPDX-License-Identifier: Apache-2.0
"""The row of the last step, which is always logged."""

import math

import pytest

from trainer.experiment import load_and_build
from trainer.trainer import Trainer


@pytest.mark.slow
def test_the_last_row_has_norms_even_if_it_is_not_due():
    experiment = load_and_build(
        'configs/mnist_mlp.py',
        data__source__limit=100,
        train_for='3 steps',
        log__every='100 steps',
        evals__test__final=False,
    )
    metrics = Trainer(experiment).fit().metrics
    norms = {name: metrics[f'train/{name}_norm'] for name in ('grad', 'param', 'update')}
    assert all(math.isfinite(value) and value > 0 for value in norms.values()), norms
