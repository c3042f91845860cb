# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: what the reporter adds to the metrics of the step."""

from __future__ import annotations

import io
import json
import pathlib

import pytest

from trainer.run.reporter import Reporter


def test_the_wait_for_data_is_a_mean_over_the_steps_of_a_row(tmp_path: pathlib.Path) -> None:
    report = Reporter(30, 8, io.StringIO())
    report.start()
    report.open(tmp_path, 4, tensorboard=False)
    report.begin(4)
    for step, wait_secs in ((10, 3.0), (20, 3.5), (30, 3.5)):
        report.time.set('data wait', wait_secs)
        report.log(step, {})
    report.end('finished', 30)
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [10, 20, 30]
    waits = [row['train/data_wait_secs'] for row in rows]
    assert waits == pytest.approx([0.5, 0.05, 0.0])


def test_restored_metrics_replace_earlier_ones() -> None:
    report = Reporter(30, 8, io.StringIO())
    report.open_eval('test', 10, {'loss': 1.0})
    report.write_row()
    assert report.has_eval('test', 10)
    report.restore(20, {'train/loss': 0.5}, ['other'])
    assert report.latest == {'train/loss': 0.5}
    assert (report.has_eval('test', 10), report.has_eval('other', 20)) == (False, True)


def test_members_are_printed_with_their_description() -> None:
    screen = io.StringIO()
    report = Reporter(30, 8, screen, ['seed 0, optimizer.learning_rate 0.1', 'seed 1'])
    report.start()
    report.begin(0)
    metrics = {'loss': 1.5, 'member_0/loss': 1.0, 'member_1/loss': 2.0, 'member_1/top/5': 0.5}
    report.open_eval('test', 30, metrics)
    report.write_row()
    report.end('finished', 30)
    lines = screen.getvalue().splitlines()
    assert '  eval/test member 0 (seed 0, optimizer.learning_rate 0.1)  loss 1' in lines
    assert '  eval/test member 1 (seed 1)  loss 2  top/5 0.5' in lines
    assert report.row == {'step': 30, **{f'eval/test/{name}': x for name, x in metrics.items()}}
