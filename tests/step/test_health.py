# SPDX-License-Identifier: Apache-2.0
"""Non-finite values are detected inside the step, and updates stop."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.inspect.models import STEP, build, linen
from tests.marks import slow_after
from trainer.ensemble.step import member_state
from trainer.run.failure import NonFiniteError
from trainer.run.restore import with_health
from trainer.step.health import GRADIENT, LOSS, PARAMETER, SLOT
from trainer.trainer import Trainer


class Plain(nn.Module):
    """A small model; if masked, it has a parameter that is partly -inf from the start."""

    masked: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        logits = nn.Dense(10)(x.reshape(len(x), -1))
        if self.masked:
            mask = self.param('mask', lambda key: jnp.full(10, -jnp.inf).at[:9].set(0.0))
            logits = logits + jax.lax.stop_gradient(jnp.maximum(mask, -1e9))
        return logits


PLAIN = {'target': f'{__name__}:Plain'}


def same(one: Any, other: Any, *, slots: bool = True) -> bool:
    names = ('params', 'collections') + (('opt_state',) if slots else ())
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(jax.tree.all(jax.tree.map(np.array_equal, *pair)) for pair in pairs)


def run(made: Any, steps: int, *, sweeps: bool = False) -> list[Any]:
    """Returns the states before the first step and after each step."""
    trainer = Trainer(made)
    function = trainer.set_up().programs._train_step
    if sweeps:  # As on an accelerator.
        function = function.with_context(sweeps=True)
    step, state = (
        jax.jit(function.update),
        with_health(made, trainer.set_up().programs, trainer.init_state()),
    )
    states = [state]
    with trainer.batches(0, [1] * steps) as batches:
        for batch in batches:
            state = step(state, batch.arrays)
            states.append(state)
    return states


@pytest.mark.slow
@pytest.mark.parametrize('sweeps', [False, True])
def test_non_finite_loss_stops_updates(sweeps: bool) -> None:
    states = run(build(linen(bad=1)), STEP + 3, sweeps=sweeps)
    for number, state in enumerate(states):
        health = state.health
        assert (int(health.bad_step), int(health.kind)) == (
            (STEP, LOSS) if number >= STEP else (0, 0)
        )
        assert int(state.step) == number
    assert not same(states[STEP - 2], states[STEP - 1])
    assert all(same(state, states[STEP - 1], slots=sweeps) for state in states[STEP:])


@pytest.mark.slow
def test_non_finite_gradients_stop_updates_with_sweeps() -> None:
    states = run(build(linen(bad=1, how='gradient')), STEP + 2, sweeps=True)
    assert (int(states[-1].health.bad_step), int(states[-1].health.kind)) == (STEP, GRADIENT)
    assert all(same(state, states[STEP - 1]) for state in states[STEP:])
    assert np.isfinite(states[-1].params['first']['bias']).all()


def broken_rate(step: Any) -> Any:
    return jnp.where(step == 5, jnp.inf, 0.01)


def overflowing() -> optax.GradientTransformation:
    """An optimizer whose state overflows in the sixth update, and whose updates are 0."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(jnp.zeros_like, updates), {'sum': state['sum'] + 6e37}

    return optax.GradientTransformation(lambda params: {'sum': jnp.zeros(())}, update)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('optimizer', 'kind', 'said'),
    [
        (
            {'target': 'optax:sgd', 'learning_rate': {'ref': f'{__name__}:broken_rate'}},
            PARAMETER,
            'a parameter is not: Dense_0/bias, Dense_0/kernel.',
        ),
        ({'target': f'{__name__}:overflowing'}, SLOT, "the optimizer's state is not: sum."),
    ],
)
def test_non_finite_parameters_and_slots_are_detected(
    optimizer: dict[str, Any], kind: int, said: str
) -> None:
    made = build(PLAIN, optimizer=optimizer)
    states = run(made, 8, sweeps=True)
    assert (int(states[-1].health.bad_step), int(states[-1].health.kind)) == (6, kind)
    with pytest.raises(NonFiniteError) as caught:  # And at the events of a run on a CPU.
        Trainer(made).fit()
    assert 'First non-finite step: 6.' in str(caught.value)
    assert f'The loss and all gradients are finite, but after the update {said}' in str(
        caught.value
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ('model', 'optimizer', 'said'),
    [
        (linen(bad=1), {}, f'Last finite step: {STEP - 1}. First non-finite step: {STEP}.'),
        (linen(bad=1), {}, 'The first module whose output is not finite is layer_1'),
        (
            PLAIN, {'learning_rate': {'ref': f'{__name__}:broken_rate'}},
            'The loss of step 7 is not finite, because a parameter already was not: '
            'Dense_0/bias, Dense_0/kernel. First non-finite step: 6, in its update.',
        ),
        (PLAIN, {'target': f'{__name__}:overflowing'}, 'became non-finite by step 10: sum.'),
    ],
)  # fmt: skip
def test_step_is_named_without_a_copy_of_the_state(
    model: Any, optimizer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a large state: only the flag and the state are available."""
    monkeypatch.setattr('trainer.inspect.stop_guard._MAX_COPY_BYTES', 0)
    default = {'target': 'optax:sgd', 'learning_rate': 0.01}
    if 'target' in optimizer:
        default = {}
    with pytest.raises(NonFiniteError) as caught:
        Trainer(build(model, optimizer={**default, **optimizer})).fit()
    assert said in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('model', 'optimizer', 'said'),
    [
        (
            linen(bad=1, how='gradient'), {},
            f'First non-finite step: {STEP}.\nThe loss and the output of every module are finite, '
            'but the gradients are not: ',
        ),
        (
            PLAIN, {'learning_rate': {'ref': f'{__name__}:broken_rate'}},
            'A parameter became non-finite in step 6: Dense_0/bias, Dense_0/kernel.',
        ),
    ],
)  # fmt: skip
def test_finding_is_named_with_sweeps(
    model: Any, optimizer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: each step checks all values, and no copy is kept."""
    monkeypatch.setattr('trainer.inspect.stop_guard._MAX_COPY_BYTES', 0)
    default = {'target': 'optax:sgd', 'learning_rate': 0.01}
    trainer = Trainer(build(model, optimizer={**default, **optimizer}))
    programs = trainer.set_up().programs
    programs._train_step = programs._train_step.with_context(sweeps=True)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert said in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize('sweeps', [False, True])
def test_values_that_are_non_finite_at_the_start_are_ignored(sweeps: bool) -> None:
    made = build({**PLAIN, 'masked': True}, train_for='12 steps')
    state = run(made, 3, sweeps=sweeps)[-1]
    assert np.isneginf(state.params['mask']).sum() == 1
    assert not state.health.is_bad
    assert Trainer(made).fit().status == 'finished'


@pytest.mark.slow
def test_values_that_are_non_finite_at_the_start_are_ignored_after_resume(
    tmp_path: pathlib.Path,
) -> None:
    made = build({**PLAIN, 'masked': True}, train_for='6 steps')
    Trainer(made, str(tmp_path)).fit(max_steps=3)
    assert Trainer(made, str(tmp_path)).fit().status == 'finished'


def test_diverged_state_is_not_saved(tmp_path: pathlib.Path) -> None:
    made = build(
        PLAIN, checkpoint__every='1 steps', log__every='40 steps',
        optimizer={'target': 'optax:sgd', 'learning_rate': {'ref': f'{__name__}:broken_rate'}},
    )  # fmt: skip
    trainer = Trainer(made, str(tmp_path))
    with pytest.raises(NonFiniteError, match='the newest checkpoint is of step 5'):
        trainer.fit()
    assert trainer.checkpoints is not None and trainer.checkpoints.latest() == 5


@pytest.mark.slow
def test_optimizer_that_handles_non_finite_gradients_continues() -> None:
    inner = {'target': 'optax:sgd', 'learning_rate': 0.01}
    made = build(
        linen(bad=1), train_for='20 steps',
        optimizer={'target': 'optax:apply_if_finite', 'inner': inner, 'max_consecutive_errors': 5},
    )  # fmt: skip
    result = Trainer(made).fit()
    assert result.status == 'finished'
    assert int(result.state.opt_state.total_notfinite) == 1


class Huge(nn.Module):
    """A model whose gradients overflow in float16 for any scale."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(10)(x.reshape(len(x), -1))
        return _steep(x)


@jax.custom_vjp
def _steep(x: Any) -> Any:
    return x


_steep.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.inf),))


@pytest.mark.slow
@pytest.mark.parametrize(('scale', 'skips', 'step'), [(2.0**60, 50, 50), (4.0, 3, 3)])
def test_too_many_skipped_updates_stop_the_run(scale: float, skips: int, step: int) -> None:
    """After 50 skips in a row, or when the scale cannot shrink further."""
    made = build(
        {'target': f'{__name__}:Huge'}, train_for='80 steps',
        precision={'compute': 'float16', 'loss_scale': scale},
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        Trainer(made).fit()
    assert f'The gradients of step {step} are not finite' in str(caught.value)
    assert f'has skipped {skips} updates in a row' in str(caught.value)


def step_by_hand(state: Any, batch: Any, ctx: Any) -> Any:
    """A custom step that uses neither `ctx.gradients` nor `ctx.update`."""

    def loss_fn(params: Any) -> Any:
        return ctx.loss(ctx.task(ctx.bind(params), batch))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    loss = jnp.where(state.step == 4, jnp.nan, loss)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, state.params, grads)
    return state.replace(params=params), {'loss': loss}


@pytest.mark.slow
def test_non_finite_loss_of_a_custom_step_stops_updates() -> None:
    made = build(PLAIN, step={'ref': f'{__name__}:step_by_hand'})
    states = run(made, 8)
    assert (int(states[-1].health.bad_step), int(states[-1].health.kind)) == (5, LOSS)
    assert all(same(state, states[4]) for state in states[5:])
    with pytest.raises(NonFiniteError, match='First non-finite step: 5'):
        Trainer(made).fit()


def ensemble(rates: tuple[float, ...], **overrides: Any) -> Any:
    vary = {'optimizer': {'learning_rate': rates}}
    return build(PLAIN, ensemble={'size': len(rates), 'vary': vary}, **overrides)


@pytest.mark.slow
def test_diverged_member_is_stopped_and_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """It keeps its state and is reported; the other members train as without it."""
    made = ensemble((0.01, 3e38, 0.02))
    trainer = Trainer(made, str(tmp_path))
    result = trainer.fit()
    assert result.status == 'finished'
    out = capsys.readouterr().out
    assert out.count('member 1 (seed 1, optimizer.learning_rate 3e+38) has diverged') == 1
    bad = int(result.state.health.bad_step[1])
    assert result.state.health.bad_step.tolist() == [0, bad, 0] and bad > 0
    # It is left out of the means over the members.
    row = result.metrics
    each = [row[f'train/member_{member}/loss'] for member in (0, 2)]
    assert row['train/loss'] == pytest.approx(np.mean(each)) and np.isfinite(each).all()
    sound = Trainer(ensemble((0.01, 0.015, 0.02))).fit().state
    for member in (0, 2):
        assert same(member_state(result.state, member), member_state(sound, member))
    # It stays stopped after a resume.
    longer = Trainer(ensemble((0.01, 3e38, 0.02), train_for='50 steps'), str(tmp_path)).fit().state
    assert longer.health.bad_step.tolist() == [0, bad, 0]
    assert same(member_state(longer, 1), member_state(result.state, 1))


@pytest.mark.slow
def test_diverged_member_is_left_out_of_evaluations(tmp_path: pathlib.Path) -> None:
    source = {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 100}
    to_float = {'target': 'trainer.data.transforms:ToFloat', 'key': 'image'}
    data = {'source': source, 'batch_size': 50, 'device_transforms': (to_float,)}
    evals = {'test': {'every': '20 steps', 'data': data}}
    trainer = Trainer(ensemble((0.01, 3e38, 0.02), evals=evals), str(tmp_path))
    result = trainer.fit()
    assert trainer.set_up().evaluators['test'].compiles == 1
    found = {name: x for name, x in result.metrics.items() if name.startswith('eval/')}
    # An ensemble of members 0 and 2 only.
    two = {'size': 2, 'vary': {'seed': (0, 2), 'optimizer': {'learning_rate': (0.01, 0.02)}}}
    sound = Trainer(build(PLAIN, ensemble=two, evals=evals)).fit().metrics
    for name in ('loss', 'accuracy', 'members/loss', 'members/accuracy'):
        assert found[f'eval/test/{name}'] == pytest.approx(sound[f'eval/test/{name}'], rel=1e-5)
    assert not np.isfinite(found['eval/test/member_1/loss'])
    # Also in other modes, which restore the state.
    state = Trainer(ensemble((0.01, 3e38, 0.02), evals=evals), str(tmp_path)).restore()
    again = trainer.evaluate(state)['test']
    assert again['loss'] == pytest.approx(found['eval/test/loss'], rel=1e-6)
    for batch in trainer.set_up().evaluators['test'].predict(state):
        assert np.isfinite(batch['probability']).all()


@pytest.mark.slow
def test_run_fails_if_all_members_diverge() -> None:
    with pytest.raises(NonFiniteError, match='all members of the ensemble have diverged'):
        Trainer(ensemble((2e38, 3e38))).fit()


def twice(state: Any, batch: Any, ctx: Any) -> Any:
    """Two updates with nested metrics; the second one is non-finite in the fifth step."""
    grads, _, first = ctx.gradients(state, batch)
    state, _ = ctx.update(state, grads)
    grads, _, second = ctx.gradients(state, batch)
    grads = jax.tree.map(lambda g: jnp.where(state.step == 5, jnp.nan, g), grads)
    state, _ = ctx.update(state, grads)
    return state, {'first': first['task'], 'inner': {'second': second}}


@pytest.mark.slow
@pytest.mark.parametrize('sweeps', [False, True])
def test_several_updates_count_as_one_step(sweeps: bool) -> None:
    made = build(PLAIN, step={'ref': f'{__name__}:twice'})
    states = run(made, 7, sweeps=sweeps)
    if sweeps:
        assert (int(states[-1].health.bad_step), int(states[-1].health.kind)) == (5, GRADIENT)
        assert all(same(state, states[4]) for state in states[5:])
    with pytest.raises(NonFiniteError, match='First non-finite step: 5'):
        Trainer(made).fit()


@pytest.mark.slow
def test_overflow_is_skipped_by_the_loss_scale() -> None:
    """A single non-finite loss is skipped and counted."""
    made = build(linen(bad=1), precision={'compute': 'float16'}, train_for='20 steps')
    result = Trainer(made).fit()
    assert result.status == 'finished'
    assert result.metrics['train/skipped_updates'] >= 1


@pytest.mark.slow
@pytest.mark.parametrize('sweeps', slow_after(1, [False, True]))
def test_zero_nans_handles_non_finite_gradients(sweeps: bool) -> None:
    chain = {
        'target': 'optax:chain',
        'args': ({'target': 'optax:zero_nans'}, {'target': 'optax:sgd', 'learning_rate': 0.01}),
    }
    states = run(build(linen(bad=1, how='gradient'), optimizer=chain), STEP + 2, sweeps=sweeps)
    assert not states[-1].health.is_bad
    assert np.isfinite(states[-1].params['first']['bias']).all()
