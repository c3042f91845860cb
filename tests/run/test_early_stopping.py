# SPDX-License-Identifier: Apache-2.0
"""Early stopping counts as Flax does, and continues counting after a resume."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import pytest
from flax.training.early_stopping import EarlyStopping as FlaxEarlyStopping

from tests import command
from tests.command import ROOT
from trainer.builders.early_stopping import EarlyStopping
from trainer.config.errors import UserError
from trainer.experiment import Experiment, load_and_build
from trainer.run.early_stopping import Patience
from trainer.trainer import Trainer


def stops_at(values: list[float], **options: Any) -> int | None:
    """Returns the number of the value that ends the run."""
    early = Patience(EarlyStopping(metric='eval/test/loss', **options))
    for number, value in enumerate(values, 1):
        early.update('other', {'loss': -number})
        early.update('test', {'loss': value})
        again = Patience(early.rule)
        again.restore(early.state())
        early = again
        if early.stopped:
            return number
    return None


@pytest.mark.parametrize('patience', [0, 1, 2, 3])
@pytest.mark.parametrize(
    'values',
    [
        [1.0, 0.9, 0.8995, 0.8994, 0.8993, 0.8992, 0.8991],
        [1.0, 2.0, 3.0, 0.5, 0.6, 0.7, 0.8, 0.9],
        [math.inf, 1.0, math.nan, math.nan, math.nan, math.nan],
        [3.0, 2.0, 1.0],
    ],
)
def test_counts_as_flax_does(values: list[float], patience: int) -> None:
    flax = FlaxEarlyStopping(min_delta=1e-3, patience=patience)
    expected = None
    for number, value in enumerate(values, 1):
        flax = flax.update(value)
        if flax.should_stop:
            expected = number
            break
    assert stops_at(values, min_delta=1e-3, patience=patience) == expected


def test_the_sequence_of_the_flax_documentation() -> None:
    assert stops_at([1.0, 0.9, 0.8995, 0.8994, 0.8993], min_delta=1e-3, patience=2) == 5


def test_an_initial_nan_is_replaced_by_a_finite_value() -> None:
    """Where Flax would never see an improvement again."""
    assert stops_at([math.nan, 1.0, 0.5, 0.4, 0.3], patience=1) is None
    assert stops_at([math.nan, math.nan], patience=1) == 2


def test_larger_values_may_be_better() -> None:
    assert stops_at([0.1, 0.2, 0.3, 0.2, 0.1], mode='max', patience=1) == 5


@pytest.mark.parametrize(
    ('metric', 'mode'),
    [('loss', 'min'), ('gen_loss', 'min'), ('mean_absolute_error', 'min'), ('accuracy', 'max'),
     ('top5_accuracy', 'max')],
)  # fmt: skip
def test_the_mode_follows_from_the_name_of_the_metric(metric: str, mode: str) -> None:
    name = f'eval/test/{metric}'
    made = build(early_stopping={'metric': name}, checkpoint__best={'metric': name})
    assert made.training.early_stopping is not None and made.training.early_stopping.mode == mode
    assert made.saving.retention.best_mode == mode


@pytest.mark.parametrize('key', ['early_stopping', 'checkpoint__best'])
def test_a_metric_name_without_a_known_mode_is_refused(key: str) -> None:
    message = rf"config.{key.replace('__', '.')}.mode is missing: .* values of 'bleu' are"
    with pytest.raises(UserError, match=message):
        build(**{key: {'metric': 'eval/test/bleu'}})
    build(**{key: {'metric': 'eval/test/bleu', 'mode': 'max'}})


@pytest.mark.slow
def test_the_reason_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    late = {
        'every': 'never',
        'data': {'source': {'target': 'trainer.data.mnist:MNIST', 'split': 'test'}},
    }
    Trainer(build(evals__late=late)).fit()
    said = capsys.readouterr().out
    assert said.count('Stopped early: eval/test/loss has not improved on') == 1
    assert "for 2 evaluations (mode 'min', patience 1)" in said


def build(**overrides: Any) -> Experiment:
    """Returns an experiment that learns nothing."""
    options = {
        'train_for': '100 steps',
        'optimizer__learning_rate': 0.0,
        'data__source__limit': 640,
        'evals__test__data__source__limit': 96,
        'evals__test__every': '10 steps',
        'checkpoint__every': '7 steps',
        'early_stopping': {'metric': 'eval/test/loss', 'patience': 1},
    }
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**options, **overrides})


@pytest.mark.parametrize(
    'pauses',
    [
        (),
        pytest.param((25,), marks=pytest.mark.slow),
        pytest.param((10, 5), marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_early_and_the_counter_is_restored(
    pauses: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    for steps in pauses:
        assert Trainer(build(), str(tmp_path)).fit(max_steps=steps).status == 'paused'
    result = Trainer(build(), str(tmp_path)).fit()
    assert (result.status, result.step) == ('stopped_early', 30)
    assert command.result(tmp_path)['status'] == 'stopped_early'
    again = Trainer(build(), str(tmp_path)).fit()
    assert (again.status, again.step) == ('stopped_early', 30)
    longer = Trainer(build(early_stopping=None, train_for='40 steps'), str(tmp_path)).fit()
    assert (longer.status, longer.step) == ('finished', 40)


@pytest.mark.slow
def test_the_final_evaluations_run_after_an_early_stop() -> None:
    late = {
        'every': 'never',
        'data': {'source': {'target': 'trainer.data.mnist:MNIST', 'split': 'test'}},
    }
    late['data']['batch_size'] = 1000  # type: ignore[index]
    result = Trainer(build(evals__late=late)).fit()
    assert result.status == 'stopped_early'
    assert result.metrics['eval/late/examples'] == 10_000


@pytest.mark.slow
def test_on_the_command_line(tmp_path: pathlib.Path) -> None:
    options = (
        '--config.optimizer.learning_rate=0', '--config.evals.test.every=10steps',
        '--config.early_stopping.metric=eval/test/loss', '--config.train_for=100steps',
    )  # fmt: skip
    finished = command.train(tmp_path, *options)
    assert 'stopped_early at step 20' in finished.out
    again = command.train(tmp_path, *options)
    assert 'already finished at step 20 (stopped_early)' in again.out


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'metric': 'eval/tset/loss'},
            "'eval/tset/loss' is not a metric of an evaluation; expected",
        ),
        ({'metric': 'eval/test/loss', 'patience': -1}, 'patience: expected at least 0'),
        ({'metric': 'eval/test/loss', 'mode': 'less'}, 'mode'),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(early_stopping=options)


def test_a_missing_metric_is_named() -> None:
    with pytest.raises(UserError, match=r"has no 'lsos'; it has loss, accuracy"):
        Trainer(build(early_stopping__metric='eval/test/lsos', early_stopping__mode='min')).fit()
