# SPDX-License-Identifier: Apache-2.0
"""Training with the tasks of this package and with tasks of users."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.tasks import Classification
from trainer.trainer import Trainer


class InBatch(Classification):
    """A task whose examples depend on each other."""

    decomposable = False


def mlp(**options: Any) -> Trainer:
    small = {'train_for': '2 steps', 'data__source__limit': 64, 'evals': {}}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    return Trainer(load_and_build(config, **{**small, **options}))


def test_task_with_in_batch_negatives_rejects_accumulate() -> None:
    target = {'target': f'{__name__}:InBatch'}
    assert mlp(task=target).fit().step == 2
    with pytest.raises(
        UserError,
        match=r'InBatch cannot be computed in 4 micro-batches: its examples depend',
    ):
        mlp(task=target, accumulate=4)


@pytest.mark.slow
def test_batch_statistics_of_micro_batches_are_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger('trainer').propagate = True
    mlp(accumulate=4).fit()
    mlp(model__batch_norm=True).fit()
    assert caplog.messages == []
    mlp(accumulate=4, model__batch_norm=True).fit()
    assert [m for m in caplog.messages if 'batch statistics' in m] == caplog.messages
    assert len(caplog.messages) == 1


def pixels(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns images and their brightness, as inputs and targets."""
    return {'x': batch['image'], 'y': batch['image'].mean((1, 2))}


@pytest.mark.slow
def test_regression_learns_from_a_config() -> None:
    fields = ({'ref': f'{__name__}:pixels'},)
    result = mlp(
        train_for='300 steps',
        model__features=(16, 1),
        task={'target': 'trainer.tasks:Regression', 'inputs': 'x', 'targets': 'y'},
        data__device_transforms=({'target': 'trainer.data.transforms:ToFloat'}, *fields),
        log__every='100 steps',
    ).fit()
    assert result.metrics['train/loss'] < 0.002
    assert result.metrics['train/mean_absolute_error'] < 0.04
