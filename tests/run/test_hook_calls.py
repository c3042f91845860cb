# SPDX-License-Identifier: Apache-2.0
"""Values that hooks return are in the row of their event, and metrics like any other."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import ml_collections
import numpy as np
import pytest

from tests.evaluate import scored
from tests.evaluate.test_host_scores import trainer
from trainer.config.errors import UserError
from trainer.hooks import Event

HERE = __name__


def values(event: Event) -> dict[str, Any] | None:
    """Returns values of every kind, under short and full names."""
    if event.kind == 'eval':
        return {
            'bleu': event.step / 10,
            'eval/dev/chrf': 0.5,
            'table': np.eye(2),
            'samples': ['a', 'b'],
        }
    return {'gap': 2.0, 'train/other': 3.0} if event.kind == 'log' else None


def failing(event: Event) -> None:
    if event.kind == 'eval':
        raise RuntimeError('the disk is full')


def slow(event: Event) -> None:
    if event.kind == 'log':
        time.sleep(0.3)


def text(event: Event) -> Any:
    return 'no dict'


def at_the_start(event: Event) -> Any:
    return {'x': 1.0}


def twice(event: Event) -> Any:
    return {'loss': 1.0} if event.kind == 'eval' else None


def config(hook: str, **changes: Any) -> ml_collections.ConfigDict:
    made = scored.config()
    made.train_for = '4 steps'
    made.hooks = {'mine': {'ref': f'{HERE}:{hook}'}}
    return made


def rows(run: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def test_values_are_in_the_one_row_of_their_event(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    result = trainer(config('values'), run).fit()
    written = rows(run)
    evals = [row for row in written if 'eval/dev/loss' in row]
    assert [row['eval/dev/bleu'] for row in evals] == [0.2, 0.4]
    assert [row['eval/dev/chrf'] for row in evals] == [0.5, 0.5]
    trains = [row for row in written if 'train/loss' in row]
    assert [row['train/gap'] for row in trains] == [2.0, 2.0]
    assert [row['train/other'] for row in trains] == [3.0, 3.0]
    assert len(written) == len(evals) + len(trains) == 4
    assert result.metrics['eval/dev/bleu'] == 0.4
    assert np.load(run / 'metrics' / 'eval_dev_4.npz')['table'].shape == (2, 2)
    assert (run / 'summaries' / '4' / 'eval' / 'dev' / 'samples.txt').exists()


def test_the_best_checkpoint_and_early_stopping_follow_a_hook(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config('values')
    made.checkpoint = dict(every='2 steps', best=dict(metric='eval/dev/bleu', mode='min'))
    made.early_stopping = dict(metric='eval/dev/chrf', mode='max')
    trained = trainer(made, tmp_path / 'run')
    with caplog.at_level('WARNING', 'trainer'):
        result = trained.fit()
    assert (result.status, result.step) == ('finished', 4)
    assert trained.restore('best').step == 2
    [line] = [m for m in caplog.messages if m.startswith('config.checkpoint.best.metric')]
    assert line.endswith("no 'bleu'; a hook (mine) must return it at each of its evaluations")


def test_a_metric_that_no_hook_returns_is_an_error_after_a_save(tmp_path: pathlib.Path) -> None:
    made = config('values')
    made.checkpoint = dict(best=dict(metric='eval/dev/blue', mode='max'))
    with pytest.raises(UserError, match=r"'dev' has no 'blue'; it has loss, .*bleu, chrf"):
        trainer(made, tmp_path / 'run').fit()
    assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()


def test_an_evaluation_is_written_although_a_hook_fails(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    with pytest.raises(RuntimeError, match='the disk is full'):
        trainer(config('failing'), run).fit()
    assert [row['step'] for row in rows(run) if 'eval/dev/loss' in row] == [2]
    assert (run / 'checkpoints' / '2').is_dir()


def test_the_time_of_hooks_is_theirs() -> None:
    trained = trainer(config('slow'))
    trained.fit()
    spent = trained.report.time
    assert spent.get('hooks') >= 0.6
    # Counted once: if the steps had them too, the parts would be more than the whole.
    parts = ('compile', 'hooks', 'data wait', 'eval', 'steps')
    assert sum(map(spent.get, parts)) < spent.total() + 0.1


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        ('text', r'config\.hooks\.mine returned str; expected None, or a dict of values by name'),
        ('at_the_start', r"returned x at a 'start' event, which has no row of metrics"),
        ('twice', r"two values of a row of metrics are named 'loss'"),
    ],
)
def test_what_a_hook_cannot_return(hook: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(config(hook)).fit()
