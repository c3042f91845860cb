# SPDX-License-Identifier: Apache-2.0
"""`fit(state=...)` continues from a state in memory, also in a changed experiment."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.in_memory import make_config
from trainer import Trainer, load_and_build
from trainer.config.errors import UserError
from trainer.step.donated import DonatedError
from trainer.step.state import TrainState


def make_trainer(workdir: str | None = None, **overrides: Any) -> Trainer:
    return Trainer(load_and_build(make_config(), **overrides), workdir, verbose=False)


def copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


@functools.cache
def _whole_run() -> Any:
    return make_trainer().fit()


@functools.cache
def _half_state() -> TrainState:
    return make_trainer().fit(max_steps=4).state


def whole() -> Any:
    """Returns the parameters after all steps, without interruption."""
    return params(_whole_run().state)


def half() -> TrainState:
    """Returns a state after half of the steps, which its caller may donate."""
    return copy(_half_state())


def params(state: TrainState) -> dict[str, Any]:
    return jax.device_get(state.params)


def test_the_same_experiment_continues_as_without_interruption() -> None:
    before = make_trainer().fit(max_steps=4)
    result = make_trainer().fit(state=before.state)
    assert (result.status, result.step) == ('finished', 8)
    jax.tree.map(np.testing.assert_array_equal, params(result.state), whole())
    assert result.history['train/loss'].steps.tolist() == [8]
    with pytest.raises(DonatedError):
        _ = before.state


@pytest.mark.slow
def test_another_learning_rate_continues_with_the_moments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = params(half())
    fast = Trainer(load_and_build(make_config(), optimizer__learning_rate=1.0))
    moved = params(fast.fit(state=half(), max_steps=1).state)
    assert 'is reset' not in capsys.readouterr().out
    slow = params(make_trainer().fit(state=half(), max_steps=1).state)
    # Adam's update is the learning rate times a function of its moments.
    steps = jax.tree.map(np.subtract, moved, before)
    jax.tree.map(
        lambda step, x, y: np.testing.assert_allclose(step, 100 * (x - y), rtol=1e-2, atol=1e-4),
        *(steps, slow, before),
    )
    # With moments that are reset, each step would be the learning rate, or its negative.
    assert np.std(np.abs(steps['Dense_0']['kernel'])) > 0.05


def test_the_state_of_another_optimizer_is_reset(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = {'target': 'optax:sgd', 'momentum': 0.9}
    other = Trainer(load_and_build(make_config(), optimizer=optimizer, ema__decay=0.5))
    expected = params(half())
    result = other.fit(state=half(), max_steps=0)
    printed = capsys.readouterr().out
    sentence = 'this experiment has another optimizer state, moving average, which is reset.'
    assert sentence in printed
    assert 'compiles again' not in caplog.text
    for tree in (params(result.state), jax.device_get(result.state.ema)):
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(result.state.opt_state)))
    assert other.fit().step == 8


def test_a_new_work_directory_gets_the_run_from_there_on(tmp_path: pathlib.Path) -> None:
    workdir = str(tmp_path / 'run')
    make_trainer(workdir).fit(state=half(), max_steps=2)
    result = make_trainer(workdir).fit()
    jax.tree.map(np.testing.assert_array_equal, params(result.state), whole())
    with pytest.raises(UserError, match=r'at step 4, but the newest checkpoint .* of step 8'):
        make_trainer(workdir).fit(state=half())


STREAM = {'data__loader': {'target': 'trainer.data.streaming:StreamLoader'}}


@pytest.mark.slow
def test_a_stream_continues_only_from_the_checkpoint_of_the_same_step(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_trainer(**STREAM).fit()
    workdir = str(tmp_path / 'run')
    half = make_trainer(workdir, **STREAM).fit(max_steps=3)
    alone = Trainer(load_and_build(make_config(), **STREAM))
    restarted = alone.fit(state=copy(half.state))
    sentence = 'fit(state): the data is a stream, and starts from its beginning.'
    assert sentence in capsys.readouterr().out
    continuing = Trainer(load_and_build(make_config(), **STREAM), workdir)
    result = continuing.fit(state=half.state)
    assert sentence not in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, params(result.state), params(whole.state))
    kernels = [params(x.state)['Dense_0']['kernel'] for x in (restarted, whole)]
    assert not np.array_equal(*kernels)


def test_a_finished_state_of_the_same_trainer_is_no_error(tmp_path: pathlib.Path) -> None:
    trainer = make_trainer(str(tmp_path / 'run'))
    state = trainer.fit().state
    assert trainer.fit(state=state).status == 'finished'


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    state = copy(_whole_run().state)
    with pytest.raises(
        UserError,
        match=r"params\['Dense_0'\]\['kernel'\] is float32\[8, 2\] in .* float32\[3, 2\] in",
    ):
        make_trainer(vars__width=3).fit(state=state)
    with pytest.raises(UserError, match=r'at step 8, but config\.train_for is only 6 steps'):
        make_trainer(train_for='6 steps').fit(state=state)
    with pytest.raises(UserError, match=r'expected a TrainState, .* got a dict'):
        make_trainer().fit(state=state.params)
