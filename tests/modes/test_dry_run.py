# SPDX-License-Identifier: Apache-2.0
"""The dry run: one step, one evaluation and one save, without leaving files."""

from __future__ import annotations

import pathlib

import pytest

from tests import command
from tests.evaluate.watched import override


@pytest.mark.parametrize(
    'extra',
    [
        (),
        pytest.param(
            ('--config.steps_per_call=7', '--config.ema.decay=0.9'), marks=pytest.mark.slow
        ),
    ],
)
def test_runs_each_part_once_and_leaves_nothing(
    tmp_path: pathlib.Path, extra: tuple[str, ...]
) -> None:
    workdir = tmp_path / 'run'
    finished = command.run(
        command.MLP, *command.SMALL, f'--workdir={workdir}', '--mode=dry_run',
        '--config.train_for=1step', '--config.evals.test.data.batch_size=100', override(tmp_path),
        *extra,
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert finished.err == ''
    for line in (
        'parameters', 'train step: compiled in', 'train step OK',
        'eval test OK (one batch)', 'checkpoint OK (', 'nothing was kept',
    ):  # fmt: skip
        assert line in finished.out
    assert ('7 train steps: compiled in' in finished.out) == bool(extra)
    # One batch to learn its shapes from, and one to evaluate.
    assert (tmp_path / 'seen').read_text() == '100\n100\n'
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('override', 'said'),
    [
        # Labels up to 9, and a model of five classes.
        ('model.features=(64, 5)', "batch['label'] contains 5 (example "),
        ('data.device_transforms[0].scale=inf', 'train/loss is not finite after one step.'),
    ],
)
def test_a_step_that_would_end_the_run_is_reported(override: str, said: str) -> None:
    finished = command.run(command.MLP, *command.SMALL, '--mode=dry_run', f'--config.{override}')
    assert finished.code == 2
    assert said in finished.err
    assert 'Everything works' not in finished.out
