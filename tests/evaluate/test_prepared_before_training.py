# SPDX-License-Identifier: Apache-2.0
"""Mistakes in an evaluation are reported before training starts."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import numpy as np
import pytest

from tests.command import ROOT
from tests.evaluate.watched import Watched
from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.data.sources import ArraySpec
from trainer.experiment import load_and_build
from trainer.trainer import Trainer


def broken(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, 'image': batch['picture']}


def flat(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, 'image': batch['image'].reshape(len(batch['image']), -1)[:, :99]}


class AlwaysTraining(nn.Module):
    """Always drops or normalises as in training."""

    part: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(10)(x.reshape(len(x), -1))
        if self.part == 'dropout':
            return nn.Dropout(0.5, deterministic=False)(x)
        return nn.BatchNorm(use_running_average=False)(x)


class Nothing:
    """An empty source."""

    def __init__(self) -> None:
        self.spec = {
            'image': ArraySpec((28, 28, 1), np.dtype('u1')),
            'label': ArraySpec((), np.dtype('i4')),
        }

    def __len__(self) -> int:
        return 0

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((len(indices), *spec.shape), spec.dtype)
            for name, spec in self.spec.items()
        }


def trainer_with(workdir: pathlib.Path | None, **test: Any) -> Trainer:
    changes = {f'evals__test__{name}': value for name, value in test.items()}
    options = {'train_for': '5 steps', 'data__source__limit': 640}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    experiment = load_and_build(config, **{**options, **changes})
    return Trainer(experiment, None if workdir is None else str(workdir))


def test_a_failing_transform_is_reported(tmp_path: pathlib.Path) -> None:
    trainer = trainer_with(tmp_path / 'run', data__transforms=({'ref': f'{__name__}:broken'},))
    with pytest.raises(KeyError, match='picture') as error:
        trainer.fit()
    assert 'This happened at the first batch of config.evals.test' in error.value.__notes__
    assert trainer.report.latest == {}
    assert not (tmp_path / 'run').exists()


def test_a_batch_that_the_model_does_not_accept() -> None:
    trainer = trainer_with(None, data__transforms=({'ref': f'{__name__}:flat'},))
    with pytest.raises(Exception, match='99') as error:
        trainer.fit()
    notes = '\n'.join(error.value.__notes__)
    assert 'at the first batch of config.evals.test' in notes
    assert 'label: int32[512]' in notes
    assert trainer.report.latest == {}


def test_a_missing_field_is_named() -> None:
    task = {'target': 'trainer.tasks:Classification', 'label': 'klass'}
    trainer = trainer_with(None, task=task)
    with pytest.raises(UserError, match=r"config\.evals\.test: the task asks for batch\['klass'\]"):
        trainer.fit()
    assert trainer.report.latest == {}


@pytest.mark.parametrize(
    ('part', 'cause'),
    [('dropout', 'needs PRNG for "dropout"'), ('norm', 'Cannot update variable "mean"')],
)
@pytest.mark.parametrize(
    'act', slow_after(1, [Trainer.fit, lambda t: [*t.predict('test', t.init_state())]])
)
def test_a_model_that_always_trains_is_refused(act: Any, part: str, cause: str) -> None:
    """The message for a model that trains during an evaluation says how to fix it."""
    model = {'target': f'{__name__}:AlwaysTraining', 'part': part}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    trainer = Trainer(load_and_build(config, model=model, train_for='5 steps'))
    words = rf'evals\.test: the model drops .*{cause}(.|\n)*argument `train`, .*docs/tutorial\.md'
    with pytest.raises(UserError, match=words) as error:
        act(trainer)
    assert error.value.__cause__ is not None
    assert trainer.report.latest == {}


@pytest.mark.parametrize(
    'act', slow_after(1, [Trainer.fit, Trainer.evaluate, lambda t: t.predict('test')])
)
def test_an_empty_split_is_refused(act: Any, tmp_path: pathlib.Path) -> None:
    trainer_with(tmp_path).fit()
    trainer = trainer_with(tmp_path, data__source={'target': f'{__name__}:Nothing'})
    with pytest.raises(UserError, match=r'config\.evals\.test\.data: the split is empty'):
        act(trainer)
    assert trainer.report.latest == {}


def test_nothing_is_compiled_and_one_batch_is_read(tmp_path: pathlib.Path) -> None:
    watched = {'target': f'{Watched.__module__}:Watched', 'directory': str(tmp_path)}
    trainer = trainer_with(None, data__batch_size=96, data__transforms=(watched,))
    evaluator = trainer.set_up().evaluators['test']
    evaluator.prepare(trainer.set_up().programs.abstract)
    assert evaluator.compiles == 0
    assert (tmp_path / 'seen').read_text() == '96\n'
