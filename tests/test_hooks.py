# SPDX-License-Identifier: Apache-2.0
"""The events that hooks get, and their order."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import pytest

from tests import small
from tests.command import result
from trainer.hooks import Event
from trainer.trainer import Trainer

SEEN: list[tuple[Event, int | None]] = []
FAIL: set[tuple[str, int]] = set()


def see(event: Event) -> None:
    SEEN.append((event, None if event.state is None else int(event.state.step)))
    if (event.kind, event.step) in FAIL:
        raise ValueError(f'no {event.kind} at {event.step}\nand more')


@pytest.fixture(autouse=True)
def clear_events() -> None:
    SEEN.clear()
    FAIL.clear()


def trainer_in(workdir: pathlib.Path | None, **overrides: Any) -> Trainer:
    options = {'checkpoint__every': '25 steps', 'hooks': {'see': {'ref': f'{__name__}:see'}}}
    return small.trainer_in(workdir, **{**options, **overrides})


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]


def kinds() -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event, _ in SEEN]


@pytest.mark.slow
def test_a_hook_gets_each_row_as_written(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path, log__every='20 steps').fit()
    given = [dict(event.row) for event, _ in SEEN if event.row]
    assert given == rows(tmp_path)
    given = [(e.kind, e.row['step'], e.evaluation) for e, _ in SEEN if e.row]
    assert given == [
        ('log', 20, None), ('eval', 20, 'test'), ('log', 40, None), ('eval', 40, 'test'),
        ('log', 50, None), ('eval', 50, 'test'),
    ]  # fmt: skip
    for event, step in SEEN:
        assert event.step == step
        assert event.row.get('step', step) == step
        # The newest of each metric: the row is a part of it.
        assert {**event.metrics, **event.row} == {**event.metrics, 'step': step} or not event.row


@pytest.mark.slow
def test_a_hook_gets_rows_without_a_work_directory_and_in_several_calls() -> None:
    trainer = trainer_in(None, steps_per_call=4)
    trainer.fit(max_steps=13)
    trainer.fit()
    logged = [(event.row['step'], step) for event, step in SEEN if event.kind == 'log']
    assert logged == [(step, step) for step in (10, 20, 30, 40, 50)]


def test_a_hook_gets_config_and_status(tmp_path: pathlib.Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(max_steps=10)
    trainer.fit()
    assert [e.status for e, _ in SEEN if e.kind == 'end'] == ['paused', 'finished']
    assert {e.status for e, _ in SEEN if e.kind != 'end'} == {None}
    assert {e.error for e, _ in SEEN} == {None}
    for event, _ in SEEN:
        assert event.config == trainer.experiment.origin.config
        assert event.config['optimizer']['target'] == 'optax:sgd'


@pytest.mark.slow
def test_the_hooks_of_a_failed_run_get_an_end_event(tmp_path: pathlib.Path) -> None:
    FAIL.add(('log', 30))
    with pytest.raises(ValueError, match='no log at 30'):
        trainer_in(tmp_path).fit()
    last, step = SEEN[-1]
    assert (last.kind, last.step, step) == ('end', 30, None)
    assert (last.status, last.error) == ('failed', 'ValueError: no log at 30')
    assert kinds().count(('end', 30)) == 1


@pytest.mark.slow
def test_a_hook_that_fails_at_the_end_does_not_hide_the_error_of_the_run(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    FAIL.update({('eval', 20), ('end', 20)})
    with (
        caplog.at_level(logging.WARNING, 'trainer'),
        pytest.raises(ValueError, match='no eval at 20'),
    ):
        trainer_in(tmp_path).fit()
    assert "config.hooks.see failed at event 'end'" in caplog.text
    assert 'ValueError: no end at 20' in caplog.text


@pytest.mark.slow
def test_a_run_that_never_started_has_no_end_event(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Exception, match='is not divisible by'):
        trainer_in(tmp_path, accumulate=7).fit()
    assert SEEN == []


@pytest.mark.slow
def test_a_finished_run_stays_finished_if_a_hook_fails_at_the_end(
    tmp_path: pathlib.Path,
) -> None:
    FAIL.add(('end', 50))
    with pytest.raises(ValueError, match='no end at 50'):
        trainer_in(tmp_path).fit()
    assert kinds().count(('end', 50)) == 1
    assert result(tmp_path)['status'] == 'finished'
    assert json.loads((tmp_path / 'run.json').read_text())['status'] == 'finished'
