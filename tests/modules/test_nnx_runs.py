# SPDX-License-Identifier: Apache-2.0
"""NNX modules with the options of a run."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests import command
from tests.modules.test_nnx_trainer import EVALS, experiment, train
from tests.parallel import group
from trainer.trainer import Trainer

MLP = 'trainer.models.mlp_nnx:MLP'
CONFIG = ('--config=configs/mnist_nnx.py', '--config.train_for=20steps', *command.SMALL)


def final(**options: Any) -> tuple[list[float], Any, Trainer]:
    trainer = Trainer(experiment(MLP, **options))
    found, state = train(trainer, trainer.init_state())
    return found, state, trainer


def assert_close(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch() -> None:
    whole, expected, _ = final()
    micro_batches, state, _ = final(accumulate=4)
    assert micro_batches == pytest.approx(whole, rel=1e-4)
    assert_close(state.params, expected.params)


@pytest.mark.slow
def test_batch_statistics_follow_each_micro_batch() -> None:
    """Four micro-batches move the running means by 1 - 0.9^4 of the way, not by 0.1."""
    moved = []
    for micro_batches in (1, 4):
        options = {'accumulate': micro_batches, 'data__batch_size': 512, 'model__batch_norm': True}
        trainer = Trainer(experiment(MLP, **options))
        with trainer.batches(0, [1]) as batches:
            batch = next(iter(batches)).arrays
            state = trainer.set_up().programs.step(trainer.init_state(), batch)
        means, _ = jax.tree.leaves(state.collections['batch_stats'])
        moved.append(np.asarray(means))
    assert np.median(moved[1] / moved[0]) == pytest.approx((1 - 0.9**4) / 0.1, rel=0.05)


@pytest.mark.slow
def test_the_moving_average_is_evaluated() -> None:
    evals = {'test': EVALS['test'], 'average': {**EVALS['test'], 'ema': True}}
    _, state, trainer = final(ema={'decay': 0.9}, evals=evals)
    average, last = (np.asarray(p['dense']['0']['kernel']) for p in (state.ema, state.params))
    assert not np.array_equal(average, last)
    found = trainer.evaluate(state)
    assert found['average']['examples'] == found['test']['examples'] == 300
    assert found['average']['loss'] != found['test']['loss']


@pytest.mark.slow
def test_several_steps_in_one_call(tmp_path: pathlib.Path) -> None:
    """With dropout, whose masks must equal those of single steps."""
    rows = []
    for calls in (1, 5):
        options = {'model__dropout_rate': 0.5, 'log__every': '5 steps'}
        made = experiment(MLP, steps_per_call=calls, **options)
        Trainer(made, str(tmp_path / str(calls))).fit()
        rows.append([r['train/loss'] for r in command.rows(tmp_path / str(calls))])
    assert len(rows[0]) == 4
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


@pytest.mark.slow
def test_the_command_line_evaluates_and_predicts(tmp_path: pathlib.Path) -> None:
    workdir = f'--workdir={tmp_path / "run"}'
    for mode in ('train', 'eval', 'predict'):
        finished = command.run(*CONFIG, workdir, f'--mode={mode}')
        assert finished.code == 0, finished.err
    (path,) = (tmp_path / 'run').glob('predictions_test_*.npz')
    with np.load(path) as saved:
        assert {len(rows) for rows in saved.values()} == {1000}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: pathlib.Path) -> None:
    results = []
    for count, devices in ((1, 2), (2, 1)):
        workdir = tmp_path / str(count)
        running = group.start(count, workdir, config=CONFIG, devices=devices)
        codes, _, errors = group.finish(running)
        assert codes == [0] * count, errors
        result = command.result(workdir)
        timed = {name for name in result['metrics'] if name.endswith(command.CLOCK)}
        values = {name: x for name, x in result['metrics'].items() if name not in timed}
        results.append((result['data_digest'], values))
    (one, expected), (two, values) = results
    assert two == one
    assert values == pytest.approx(expected, rel=1e-3)
