# SPDX-License-Identifier: Apache-2.0
"""The example of PPO: exact resume, several devices, and what it learns."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest

from tests import command
from tests.small import one_device
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'ppo.py')
FEW: dict[str, Any] = {
    'train_for': '10 steps',
    'vars__batch_size': 32,
    'data__source__envs': 8,
    'data__source__steps': 8,
    'data__source__epochs': 2,
    'evals__episodes__every': '5 steps',
    'evals__episodes__data__batch_size': 8,
    'evals__episodes__data__source__count': 12,
    'evals__episodes__task__env__most_steps': 20,
    'log__every': '2 steps',
    'checkpoint__every': '5 steps',
    'checkpoint__keep_last': 2,
}


def trainer(workdir: pathlib.Path | None = None, **options: Any) -> Trainer:
    mesh = options.pop('mesh', None) or one_device()
    experiment = load_and_build(CONFIG, **options)
    directory = None if workdir is None else str(workdir)
    return Trainer(experiment, directory, mesh=mesh, verbose=False)


def test_a_killed_run_equals_one_that_is_not(tmp_path: pathlib.Path) -> None:
    """It resumes at step 5, in the middle of a rollout of four batches."""
    result = command.assert_resumes(
        lambda workdir: trainer(workdir, **FEW).fit(), tmp_path / 'whole', 5
    )
    assert result.metrics['eval/episodes/examples'] == 12
    length = result.metrics['eval/episodes/episode_length']
    assert 5 < length == result.metrics['eval/episodes/episode_return'] <= 20
    assert (tmp_path / 'whole/summaries/10/eval/episodes/episode.png').exists()


@pytest.mark.slow
def test_several_devices_play_the_same() -> None:
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ('data',), kinds, devices=jax.devices()[:4])
    a, b = trainer(**FEW).fit(), trainer(**FEW, mesh=mesh).fit()
    assert abs(a.metrics['train/loss'] - b.metrics['train/loss']) < 1e-4
    assert a.metrics['eval/episodes/episode_return'] == pytest.approx(
        b.metrics['eval/episodes/episode_return'], abs=1
    )


@pytest.mark.slow
def test_it_learns_to_balance_the_pole() -> None:
    result = trainer(
        evals__episodes__every='never', train_for='1600 steps', log__every='1600 steps'
    ).fit()
    assert result.metrics['eval/episodes/examples'] == 100
    assert result.metrics['eval/episodes/episode_return'] >= 475
