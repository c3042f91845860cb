# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: what is added to what the step has measured."""

from __future__ import annotations

import io
import json
import pathlib

import pytest

from trainer.observe.reporter import Reporter


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


def test_what_is_restored_replaces_what_was_known() -> None:
    report = Reporter(30, 8, io.StringIO())
    report.evaluated('test', 10, {'loss': 1.0})
    assert report.has_eval('test', 10)
    report.restore(20, {'train/loss': 0.5}, ['other'])
    assert report.latest == {'train/loss': 0.5}
    assert (report.has_eval('test', 10), report.has_eval('other', 20)) == (False, True)
