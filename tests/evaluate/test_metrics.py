# SPDX-License-Identifier: Apache-2.0
"""Metrics that are not numbers: dicts are flattened, arrays go to files, others are refused."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import command
from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.modes.dry_run import rehearse
from trainer.tasks import Classification, TaskOutput
from trainer.tasks.metrics import WeightedMean
from trainer.trainer import Trainer

CONFIG = str(ROOT / 'configs' / 'mnist_mlp.py')


@flax.struct.dataclass
class Confusion(clu.metrics.Metric):
    """A confusion matrix: how often each class is predicted for each label."""

    counts: jax.Array

    @classmethod
    def empty(cls) -> Any:
        return cls(counts=jnp.zeros((10, 10), jnp.int32))

    @classmethod
    def from_model_output(cls, *, guess: Any, label: Any, mask: Any, **_: Any) -> Any:
        empty = jnp.zeros((10, 10), jnp.int32)
        return cls(counts=empty.at[label, guess].add(mask.astype(jnp.int32)))

    def merge(self, other: Any) -> Any:
        return type(self)(counts=self.counts + other.counts)

    def compute(self) -> Any:
        return self.counts


@flax.struct.dataclass
class Recall(Confusion):
    """Per class and overall; fails without data."""

    def compute(self) -> Any:
        total = int(self.counts.sum())
        hits = np.diag(self.counts)
        some = {'few': hits[:5].sum() / total, 'many': hits.sum() / total}
        return {'share': some, 'one': np.float32(1 / total * total).reshape(1), 'is_any': total > 0}


@flax.struct.dataclass
class ReturningList(Confusion):
    def compute(self) -> Any:
        return list(self.counts)


class Confused(Classification):
    """Classification with a matrix and a dict among its metrics."""

    metrics = clu.metrics.Collection.create(  # type: ignore[assignment]
        loss=WeightedMean.from_output('loss'), confusion=Confusion, recall=Recall
    )

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        logits = model(batch[self.inputs])
        output = super().__call__(lambda _: logits, batch)
        outputs = {'guess': logits.argmax(-1), 'label': batch[self.label]}
        return TaskOutput(loss=output.loss, metrics=outputs)


class Unusable(Confused):
    metrics = clu.metrics.Collection.create(
        loss=WeightedMean.from_output('loss'), scores=ReturningList
    )  # type: ignore[assignment]


class Spread(Confused):
    metrics = clu.metrics.Collection.create(scores=clu.metrics.Std.from_output('loss'))  # type: ignore[assignment]


@flax.struct.dataclass
class Twice(Confusion):
    def compute(self) -> Any:
        return {'a/b': 1, 'a': {'b': 2}}


class Clashing(Confused):
    metrics = clu.metrics.Collection.create(scores=Twice)  # type: ignore[assignment]


@flax.struct.dataclass
class LikeAll(Confusion):
    def compute(self) -> Any:
        return {'members': 1}


class ClashingInEnsembles(Confused):
    metrics = clu.metrics.Collection.create(member_0=LikeAll, members=Confusion)  # type: ignore[assignment]


def task(name: str) -> dict[str, str]:
    return {'target': f'{__name__}:{name}'}


OPTIONS: dict[str, Any] = {
    'train_for': '8 steps',
    'data__source__limit': 320,
    'evals__test__data__source__limit': 100,
    'evals__test__data__batch_size': 64,
    'evals__test__every': '4 steps',
    'log__every': '4 steps',
}


def trainer_in(workdir: pathlib.Path | None, **overrides: Any) -> Trainer:
    experiment = load_and_build(CONFIG, **{**OPTIONS, **overrides})
    trainer = Trainer(experiment, None if workdir is None else str(workdir))
    trainer.report.progress._output = io.StringIO()
    return trainer


def screen_text(trainer: Trainer) -> str:
    output = trainer.report.progress._output
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_a_matrix_and_a_dict_in_training_and_evaluation(tmp_path: pathlib.Path) -> None:
    best = {'metric': 'eval/test/recall/share/many', 'mode': 'max'}
    trainer = trainer_in(
        tmp_path, task=task('Confused'), evals__test__task=task('Confused'),
        checkpoint__best=best, checkpoint__every='4 steps',
        early_stopping={'metric': 'eval/test/recall/share/few', 'mode': 'max', 'patience': 5},
    )  # fmt: skip
    result = trainer.fit()
    assert result.status == 'finished'
    assert trainer.experiment.training.early_stopping is not None
    assert trainer._recovery.early_stopping is not None
    assert trainer._recovery.early_stopping.best is not None
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.best() in (4, 8)

    for row in rows(tmp_path):
        assert all(isinstance(x, (int, float)) and x is not None for x in row.values()), row
    evaluated = [row for row in rows(tmp_path) if 'eval/test/loss' in row]
    assert [row['step'] for row in evaluated] == [4, 8]
    trained = [row for row in rows(tmp_path) if 'train/loss' in row]
    assert [row['step'] for row in trained] == [4, 8]
    kinds = [(evaluated, 'eval/test', 'eval_test', 100), (trained, 'train', 'train', 128)]
    for found, prefix, name, examples in kinds:
        for row in found:
            arrays = dict(np.load(tmp_path / 'metrics' / f'{name}_{row["step"]}.npz'))
            assert list(arrays) == ['confusion']
            assert arrays['confusion'].sum() == examples
            hits = np.trace(arrays['confusion']) / examples
            assert row[f'{prefix}/recall/share/many'] == pytest.approx(hits)
            assert (row[f'{prefix}/recall/one'], row[f'{prefix}/recall/is_any']) == (1.0, 1)
    lines = screen_text(trainer)
    assert f'confusion int32[10, 10] in {tmp_path}/metrics/eval_test_4.npz' in lines
    assert f'step 8:  confusion int32[10, 10] in {tmp_path}/metrics/train_8.npz' in lines

    again = trainer.evaluate(result.state)['test']
    assert again['recall/share/many'] == evaluated[-1]['eval/test/recall/share/many']
    np.testing.assert_array_equal(again.arrays['confusion'], arrays_of(tmp_path / 'metrics', 8))


def arrays_of(folder: pathlib.Path, step: int) -> np.ndarray:
    return np.load(folder / f'eval_test_{step}.npz')['confusion']


@pytest.mark.slow
def test_members_of_an_ensemble(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(
        tmp_path, ensemble__size=2, train_for='4 steps',
        task=task('Confused'), evals__test__task=task('Confused'),
    )  # fmt: skip
    metrics = trainer.fit().metrics
    each = [metrics[f'eval/test/member_{i}/recall/share/many'] for i in range(2)]
    assert metrics['eval/test/members/recall/share/many'] == pytest.approx(np.mean(each))
    arrays = np.load(tmp_path / 'metrics' / 'eval_test_4.npz')
    assert set(arrays) == {
        'confusion', 'members/confusion', 'member_0/confusion', 'member_1/confusion',
    }  # fmt: skip
    both = arrays['member_0/confusion'] + arrays['member_1/confusion']
    np.testing.assert_array_equal(arrays['members/confusion'], both / 2)
    assert set(np.load(tmp_path / 'metrics' / 'train_4.npz')) == {
        'confusion', 'member_0/confusion', 'member_1/confusion',
    }  # fmt: skip
    assert 'recall/share/few' in screen_text(trainer).split('member 1 (seed 1)  ')[-1]
    assert 'member 1 (seed 1)  ' in screen_text(trainer)


@pytest.mark.slow
def test_without_a_work_directory_array_metrics_are_printed() -> None:
    trainer = trainer_in(None, train_for='4 steps', evals__test__task=task('Confused'))
    trainer.fit()
    assert 'confusion int32[10, 10]\n' in screen_text(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('Unusable', "the metric 'scores' computes list; expected a number, an array"),
        ('Spread', "the metric 'scores' cannot be computed for any data: TypeError"),
        ('Clashing', "two values of a row of metrics are named 'scores/a/b'"),
    ],
)
def test_an_invalid_metric_is_refused_at_the_start(
    tmp_path: pathlib.Path, name: str, message: str
) -> None:
    trainer = trainer_in(tmp_path / 'run', evals__test__task=task(name))
    with pytest.raises(UserError, match=rf'config\.evals\.test: {message}'):
        trainer.fit()
    with pytest.raises(UserError, match=message):
        rehearse(trainer.experiment, str(tmp_path / 'dry'))
    trainer = trainer_in(tmp_path / 'run', task=task(name))
    with pytest.raises(UserError, match=message):
        trainer.fit()
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_metric_name_reserved_for_members_is_refused() -> None:
    named = {'evals__test__task': task('ClashingInEnsembles')}
    trainer = trainer_in(None, ensemble__size=2, **named)
    with pytest.raises(UserError, match="are named 'member_0/members'"):
        trainer.fit()
    assert trainer_in(None, train_for='1 step', **named).fit().status == 'finished'


@pytest.mark.slow
def test_an_array_metric_cannot_rank_or_stop() -> None:
    best = {'metric': 'eval/test/confusion', 'mode': 'max'}
    # A metric that cannot be computed without data would leave the available names unknown.
    trainer = trainer_in(None, evals__test__task=task('JustConfused'), checkpoint__best=best)
    with pytest.raises(UserError, match=r"best.metric: 'confusion' of .* is not a number but int"):
        trainer.fit()


class JustConfused(Confused):
    metrics = clu.metrics.Collection.create(confusion=Confusion)  # type: ignore[assignment]


@pytest.mark.slow
def test_the_mode_eval_writes_array_metrics(tmp_path: pathlib.Path) -> None:
    args = (
        command.MLP, *command.SMALL, '--config.train_for=4steps', f'--workdir={tmp_path}',
        f'--config.evals.test.task={{"target": "{__name__}:Confused"}}',
    )  # fmt: skip
    assert command.run(*args).code == 0
    found = command.run(*args, '--mode=eval')
    assert found.code == 0, found.err
    path = tmp_path / 'metrics_test_4.npz'
    assert f'{path}: confusion int32[10, 10]' in found.out
    np.testing.assert_array_equal(np.load(path)['confusion'], arrays_of(tmp_path / 'metrics', 4))
