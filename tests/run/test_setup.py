# SPDX-License-Identifier: Apache-2.0
"""The parts of a run: opened without devices or files, then set up for a mesh."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from tests.step import tiny
from trainer.config.errors import UserError
from trainer.run import setup
from trainer.trainer import Trainer


def open_run(trainer: Trainer, workdir: pathlib.Path | None = None) -> setup.Run:
    return setup.open_run(trainer.experiment, None if workdir is None else str(workdir))


def test_opening_writes_nothing(tmp_path: pathlib.Path) -> None:
    run = open_run(tiny.trainer(), tmp_path / 'run')
    assert run.workdir is not None and run.checkpoints is not None
    assert run.checkpoints.latest() is None
    assert not (tmp_path / 'run').exists()
    assert (run.batch_sizes.parts, run.refusal) == (((0, 32),), None)


def test_without_a_work_directory_there_are_no_checkpoints() -> None:
    run = open_run(tiny.trainer())
    assert (run.workdir, run.checkpoints, run.refusal) == (None, None, None)
    assert run.events.total_steps == 20


def test_evaluators_by_name() -> None:
    parts = tiny.trainer().set_up()
    assert list(parts.evaluators) == ['test']
    assert parts.evaluator('test', '--x') is parts.evaluators['test']
    with pytest.raises(UserError, match=r'^--x: .*tset.*test'):
        parts.evaluator('tset', '--x')


def test_sharding_rules_that_do_not_fit_the_mesh_are_refused_before_tracing() -> None:
    rule = {'target': 'trainer.parallel.sharding:ByPath', 'rules': (('x', ('nothing',)),)}
    with pytest.raises(UserError, match=r"the pattern 'x'.*nothing"):
        tiny.trainer(sharding=rule).set_up()


def test_batches_start_at_the_given_step() -> None:
    trainer = tiny.trainer()
    expected = trainer.experiment.data.block(5, 1).arrays['x'][0]
    with trainer.batches(5, [1]) as batches:
        batch = next(iter(batches))
    assert (batch.start, batch.count) == (5, 1)
    np.testing.assert_array_equal(batch.arrays['x'], expected)


def test_parameters_to_evaluate_are_those_of_the_state_by_default() -> None:
    trainer = tiny.trainer()
    state = trainer.init_state()
    assert setup.eval_params(trainer.experiment, trainer.set_up().programs, state) is state.params


@pytest.mark.parametrize(('steps_per_call', 'count'), [(1, 1), (4, 2)])
def test_programs_that_training_calls_are_compiled(steps_per_call: int, count: int) -> None:
    trainer = tiny.trainer(evals={}, steps_per_call=steps_per_call)
    programs = trainer.set_up().programs
    started = setup.start_compiling(trainer.experiment, programs)
    assert started[-1] is programs.step and len(started) == count
