# SPDX-License-Identifier: Apache-2.0
"""Values that hooks return are in the row of their event, and metrics like any other."""

from __future__ import annotations

import json
import pathlib
import shutil
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


def return_at_start(event: Event) -> Any:
    return {'x': 1.0}


def return_at_end(event: Event) -> Any:
    return {'x': 1.0} if event.kind == 'end' else None


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


def return_once(event: Event) -> dict[str, Any] | None:
    if event.kind != 'eval':
        return None
    if event.step == 4:
        raise RuntimeError('too late')
    return {'bleu': 0.9}


def test_a_value_of_an_earlier_evaluation_ranks_no_later_checkpoint(tmp_path: pathlib.Path) -> None:
    made = config('return_once')
    made.checkpoint = dict(every='2 steps', best=dict(metric='eval/dev/bleu', mode='max'))
    with pytest.raises(RuntimeError, match='too late'):
        trainer(made, tmp_path / 'run').fit()
    assert trainer(made, tmp_path / 'run').restore('best').step == 2


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
        ('return_at_start', r"returned x at event 'start', which has no row of metrics"),
        ('return_at_end', r"returned x at event 'end', .*\(the last 'eval' comes before 'end'\)"),
        ('twice', r"two values of a row of metrics are named 'loss'"),
    ],
)
def test_what_a_hook_cannot_return(hook: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(config(hook)).fit()


SEEN: list[tuple[str, int]] = []


def test_values_at_the_end_cost_no_step(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    with pytest.raises(UserError, match="event 'end'"):
        trainer(config('return_at_end'), run).fit()
    assert (run / 'checkpoints' / '4').is_dir()


def periodic(event: Event) -> dict[str, Any] | None:
    """Counts its events; returns values and a text at those of its own."""
    SEEN.append((event.kind, event.step))
    if event.kind != 'step':
        return None
    assert int(event.state.step) == event.step
    return {'x': event.step * 2, 'text': 'a text', 'table': np.eye(2), 'seen': len(event.metrics)}


def failing_twice(event: Event) -> Any:
    SEEN.append((event.kind, event.step))
    if event.kind in ('log', 'end'):
        raise RuntimeError(f'no disk at {event.step}')


def full_names(event: Event) -> Any:
    return {'train/x': 1.0} if event.kind == 'step' else None


@pytest.fixture(autouse=True)
def clear_seen() -> None:
    SEEN.clear()


def test_a_hook_with_a_period_has_events_and_rows_of_its_own(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    made = config('periodic')
    made.train_for = '6 steps'
    made.hooks.mine.every = '3 steps'
    made.checkpoint = dict(every='2 steps')
    trainer(made, run).fit()
    assert SEEN == [('start', 0), ('step', 3), ('step', 6), ('end', 6)]
    written = [(row['step'], min(row.keys() - {'step'}).split('/')[0]) for row in rows(run)]
    # In the order of the steps: the row of a log event is written before that of a later step.
    assert [step for step, _ in written] == [2, 2, 3, 4, 4, 6, 6, 6]
    assert [name for step, name in written if step == 6] == ['train', 'eval', 'hook']
    own = [row for row in rows(run) if 'hook/mine/x' in row]
    assert [row['hook/mine/x'] for row in own] == [6, 12]
    # At step 6 it sees the evaluation of that step.
    assert own[1]['hook/mine/seen'] > own[0]['hook/mine/seen']
    assert np.load(run / 'metrics' / 'hook_mine_6.npz')['table'].shape == (2, 2)
    assert (run / 'summaries' / '6' / 'hook' / 'mine' / 'text.txt').read_text() == 'a text\n'


@pytest.mark.parametrize('steps_per_call', [1, 4])
def test_the_period_of_a_hook_ends_a_call_of_fused_steps(steps_per_call: int) -> None:
    made = config('periodic')
    made.train_for = '7 steps'
    made.evals, made.log.every, made.steps_per_call = {}, '7 steps', steps_per_call
    made.hooks.mine.every = '5 steps'
    trainer(made).fit()
    assert SEEN == [('start', 0), ('step', 5), ('end', 7)]


def test_after_a_warning_a_hook_is_called_again(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config('failing_twice')
    made.hooks.mine.on_error = 'warn'
    with caplog.at_level('WARNING', 'trainer'):
        result = trainer(made, tmp_path / 'run').fit()
    assert (result.status, result.step) == ('finished', 4)
    assert SEEN == [
        ('start', 0), ('log', 2), ('eval', 2), ('log', 4), ('eval', 4), ('save', 4), ('end', 4)
    ]  # fmt: skip
    failed = [record for record in caplog.records if 'config.hooks.mine' in record.message]
    assert [record.message.split(' failed ')[1] for record in failed] == [
        "at event 'log' of step 2; the run continues",
        "at event 'log' of step 4; the run continues",
        "at event 'end'",
    ]
    assert all('no disk' in str((record.exc_info or ())[1]) for record in failed)
    # Its rows are written although it failed.
    assert len(rows(tmp_path / 'run')) == 4


def test_a_warning_covers_what_a_hook_returns(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config('twice')
    made.hooks.mine.on_error = 'warn'
    with caplog.at_level('WARNING', 'trainer'):
        trainer(made, tmp_path / 'run').fit()
    errors = [str((record.exc_info or (0, ''))[1]) for record in caplog.records]
    [first, _] = [text for text in errors if 'named' in text]
    assert first.startswith("config.hooks.mine: two values of a row of metrics are named 'loss'")


def test_the_row_of_a_step_event_has_no_other_names() -> None:
    made = config('full_names')
    made.hooks.mine.every = '2 steps'
    with pytest.raises(UserError, match=r"whose row has only names 'hook/mine/\.\.\.'"):
        trainer(made).fit()


def test_a_hook_with_a_period_measures_no_evaluation() -> None:
    made = config('values')
    made.hooks.mine.every = '2 steps'
    made.early_stopping = dict(metric='eval/dev/chrf', mode='max')
    with pytest.raises(UserError, match="'dev' has no 'chrf'; it has loss"):
        trainer(made).fit()


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        ({'every': '2 steps'}, r"config\.hooks\.mine: expected an object, a dict with 'target'"),
        ({'ref': f'{HERE}:HERE'}, r'config\.hooks\.mine: expected a function'),
        ({'ref': f'{HERE}:text', 'on_error': 'ignore'}, r"on_error: 'ignore' is none of 'stop'"),
        ({'ref': f'{HERE}:text', 'every': '2'}, r'config\.hooks\.mine\.every'),
    ],
)
def test_mistakes_in_a_hook_are_found_at_the_start(hook: dict[str, str], message: str) -> None:
    made = config('text')
    made.hooks = {'mine': hook}
    with pytest.raises(UserError, match=message):
        trainer(made)


def bad_name(event: Event) -> Any:
    return {'../samples': ['a']} if event.kind == 'eval' else None


def test_the_name_of_a_summary_is_checked(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"hooks\.mine: a summary is named '\.\./samples'"):
        trainer(config('bad_name'), tmp_path / 'run').fit()


def test_a_resumed_run_removes_the_summaries_of_later_steps(tmp_path: pathlib.Path) -> None:
    run = tmp_path / 'run'
    made = config('values')
    made.checkpoint = dict(every='2 steps')
    trainer(made, run).fit()
    shutil.rmtree(run / 'checkpoints' / '4')
    (run / 'result.json').unlink()
    made.hooks = {}
    trainer(made, run).fit()
    assert [path.name for path in (run / 'summaries').iterdir()] == ['2']
    assert [path.name for path in (run / 'metrics').iterdir()] == ['eval_dev_2.npz']


def values_once(event: Event) -> Any:
    if event.step > 2 and event.kind == 'eval':
        raise RuntimeError('no disk')
    return {'bleu': 1.0} if event.kind == 'eval' else None


def test_a_watched_metric_is_missed_also_after_a_warning(tmp_path: pathlib.Path) -> None:
    made = config('values_once')
    made.hooks.mine.on_error = 'warn'
    made.checkpoint = dict(every='2 steps', best=dict(metric='eval/dev/bleu', mode='max'))
    trained = trainer(made, tmp_path / 'run')
    with pytest.raises(UserError, match="'dev' has no 'bleu'"):
        trained.fit()
    # Step 4 is saved, but not ranked by the value of step 2.
    assert (tmp_path / 'run' / 'checkpoints' / '4').is_dir()
    assert trained.restore('best').step == 2
