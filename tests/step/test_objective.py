# SPDX-License-Identifier: Apache-2.0
"""Optimizers that take the loss, or the loss as a function, in addition to gradients."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.marks import slow_except
from tests.step import tiny
from trainer.config.errors import UserError
from trainer.step.health import Health, check_arrays
from trainer.tasks import TaskOutput

ADAM = {'target': 'optax:adam', 'learning_rate': 0.01}
LBFGS = {'target': 'optax:lbfgs'}
POLYAK = {'target': 'optax:polyak_sgd'}
ONE = {'train_for': '1 steps', 'evals': {}}


def chain(*parts: Any) -> dict[str, Any]:
    return {'target': 'optax:chain', 'args': parts}


class Seen(NamedTuple):
    """The arguments of an optimizer: the value, that of the function, and the error of its slope.

    Attributes:
        value: as given.
        again: of the function, at the same parameters.
        off: the norm of its gradient there minus the given one.
    """

    value: jax.Array
    again: jax.Array
    off: jax.Array


def looks(*, calls: bool = True) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps its arguments in its state."""

    def init(params: Any) -> Seen:
        del params
        return Seen(*jnp.zeros((3, 1))[:, 0])

    def update(updates: Any, state: Seen, params: Any, **extra: Any) -> Any:
        del state
        seen = Seen(extra['value'], extra['value'], jnp.float32(0))
        if calls:
            again, slope = jax.value_and_grad(extra['value_fn'])(params)
            off = optax.tree.norm(optax.tree.sub(slope, extra['grad']))
            seen = Seen(extra['value'], again, off.astype(jnp.float32))
        return jax.tree.map(lambda g: -0.1 * g, updates), seen

    return optax.GradientTransformationExtraArgs(init, update)


class Noisy(nn.Module):
    """A model with random numbers and batch statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def weighted_task(model: Any, batch: Any) -> TaskOutput:
    """A task with different weights of examples, and a penalty."""
    loss = optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])
    norm = sum(jnp.sum(p**2) for p in jax.tree.leaves(model.params))
    return TaskOutput(loss=loss, weights=batch['label'] * 1.0, penalties={'l2': 1e-3 * norm})


def two_losses(model: Any, batch: Any) -> TaskOutput:
    """A task with a different loss for each layer."""
    loss = optax.softmax_cross_entropy_with_integer_labels(model(batch['x']), batch['label'])
    return TaskOutput(loss={'one': loss, 'two': 2 * loss + 1})


def seen_by(**options: Any) -> list[Seen]:
    """Returns the arguments that each recording optimizer got in the last of three steps."""
    options = {'optimizer': LOOKS, 'model': MODEL, 'evals': {}, **options}
    state = tiny.trainer(train_for='3 steps', **options).fit().state
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Seen))
    return [jax.device_get(x) for x in nodes if isinstance(x, Seen)]


LOOKS = {'target': f'{__name__}:looks'}
MODEL = {'target': f'{__name__}:Noisy'}
COURSES: dict[str, dict[str, Any]] = {
    'plain': {},
    'accumulated': {'accumulate': 4},
    'weighted': {'task': {'ref': f'{__name__}:weighted_task'}},
    'weighted and accumulated': {'task': {'ref': f'{__name__}:weighted_task'}, 'accumulate': 4},
    'sharded': {'mesh': {'data': 2, 'fsdp': 4}, 'sharding': 'fsdp'},
    'sharded and accumulated': {'mesh': {'fsdp': 8}, 'sharding': 'fsdp', 'accumulate': 2},
    'partly frozen': {'optimizer': {**LOOKS, 'freeze': 'Dense_0/.*'}},
    'clipped': {'optimizer': {**LOOKS, 'clip_norm': 0.1}},
    'masked by optax': {'optimizer': {
        'target': 'optax:masked', 'inner': LOOKS, 'mask_compatible_extra_args': True,
        'mask': {'ref': 'tests.step.perceptron:kernels'},
    }},
    'within a chain': {'optimizer': chain({'target': 'optax:clip', 'max_delta': 1.0}, LOOKS)},
    'fused': {'steps_per_call': 3},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', slow_except(['weighted', 'sharded'], COURSES))
def test_value_fn_repeats_the_forward_pass(name: str) -> None:
    """Same loss and gradient at the same parameters: same dropout masks, all micro-batches."""
    (seen,) = seen_by(**COURSES[name])
    assert seen.value > 0.1
    np.testing.assert_allclose(seen.again, seen.value, rtol=1e-5)
    assert seen.off < 1e-5


HALF = {'precision': {'compute': 'float16', 'loss_scale': 8.0}}


@pytest.mark.slow
def test_value_is_the_logged_loss() -> None:
    """The loss of the whole batch, for any number of micro-batches, without the loss scale."""
    for options in ({}, {'accumulate': 4}, HALF):
        optimizer = {**LOOKS, 'calls': False}
        trainer = tiny.trainer(
            optimizer=optimizer, log={'every': '1 steps', 'tensorboard': False}, **ONE, **options
        )
        result = trainer.fit()
        value = float(jax.tree.leaves(result.state.opt_state)[0])
        assert value == pytest.approx(result.metrics['train/loss'], rel=1e-6)


@pytest.mark.slow
def test_each_group_gets_its_own_loss() -> None:
    groups = {
        'a': {**LOOKS, 'params': 'Dense_0/.*', 'loss': 'one'},
        'b': {**LOOKS, 'params': '(Dense_1|BatchNorm_0)/.*', 'loss': 'two'},
    }
    task = {'ref': f'{__name__}:two_losses'}
    one, two = seen_by(optimizer={'groups': groups}, task=task)
    np.testing.assert_allclose(two.value, 2 * one.value + 1, rtol=1e-5)
    for seen in (one, two):
        np.testing.assert_allclose(seen.again, seen.value, rtol=1e-5)
        assert seen.off < 1e-5


@pytest.mark.slow
def test_value_fn_accepts_the_optimizer_view_of_parameters() -> None:
    """The optimizer sees float32 and pairs; the model gets parameters in its own dtypes."""
    (seen,) = seen_by(precision={'params': 'bfloat16'})
    np.testing.assert_allclose(seen.again, seen.value, rtol=1e-2)
    (seen,) = seen_by(model={'target': f'{__name__}:Complex'}, task={'ref': f'{__name__}:distance'})
    np.testing.assert_allclose(seen.again, seen.value, rtol=1e-6)
    assert seen.off < 1e-5


class Complex(nn.Module):
    """The distance of a complex parameter from a target."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        z = self.param('z', lambda key: jnp.complex64(0.5 + 0.5j))
        return jnp.abs(z - (1 - 2j)) ** 2 * jnp.ones(x.shape[0])


def distance(model: Any, batch: Any) -> Any:
    return model(batch['x'])


@pytest.mark.slow
def test_line_search_equals_the_loop_of_optax() -> None:
    """Compared with the loop of optax's documentation, on batches of the whole dataset."""
    data = {'source': tiny.SOURCE, 'batch_size': 256, 'shuffle': False}
    trainer = tiny.trainer(optimizer=LBFGS, data=data, evals={}, train_for='5 steps')
    params = jax.device_get(trainer.init_state().params)
    found = trainer.fit().state.params
    points, net, tx = tiny.Points().gather(np.arange(256)), tiny.Net(), optax.lbfgs()
    x, label = points['x'], points['label']

    def loss(params: Any) -> Any:
        logits = net.apply({'params': params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(params)
        extra = {'value': value, 'grad': grad, 'value_fn': loss}
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    first, state = float(loss(params)), tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert float(loss(params)) < 0.6 * first
    assert float(loss(found)) == pytest.approx(float(loss(params)), rel=0.05)


@pytest.mark.slow
def test_ensemble_members_have_separate_line_searches() -> None:
    """Each member as it would be alone."""
    alone = tiny.trainer(optimizer=LBFGS, evals={}, train_for='4 steps').fit()
    both = tiny.trainer(
        optimizer=LBFGS, evals={}, train_for='4 steps', ensemble={'size': 2}
    ).fit()  # fmt: skip
    assert both.metrics['train/member_0/loss'] == pytest.approx(
        alone.metrics['train/loss'], rel=1e-2
    )


OPTIMIZERS: dict[str, dict[str, Any]] = {
    'polyak_sgd': POLYAK,
    'momo': {'target': 'optax.contrib:momo'},
    'momo_adam': {'target': 'optax.contrib:momo_adam'},
    'sophia': {'target': 'optax.contrib:sophia', 'learning_rate': 0.02},
    'sam': {'target': 'optax.contrib:sam', 'optimizer': ADAM, 'opaque_mode': True,
            'adv_optimizer': {'target': 'optax:sgd', 'learning_rate': 0.05}},
    'backtracking': chain(
        {'target': 'optax:sgd', 'learning_rate': 1.0},
        {'target': 'optax:scale_by_backtracking_linesearch', 'max_backtracking_steps': 10},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizers_with_extra_arguments_learn(name: str) -> None:
    result = tiny.trainer(optimizer=OPTIMIZERS[name], evals={}, train_for='30 steps').fit()
    assert result.metrics['train/loss'] < 0.6


@pytest.mark.slow
def test_logged_rate_includes_factors_of_the_state(caplog: pytest.LogCaptureFixture) -> None:
    """Factors of a plateau or a line search are included; an upper bound is not logged."""
    plateau = {'target': 'optax.contrib:reduce_on_plateau', 'patience': 1, 'factor': 0.5}
    tiny_rate = {'target': 'optax:sgd', 'learning_rate': 1e-9}
    data = {'source': tiny.SOURCE, 'batch_size': 256}
    result = tiny.trainer(
        optimizer=chain(tiny_rate, plateau), data=data, evals={}, train_for='8 steps',
        log={'learning_rates': ('args[0].learning_rate',)},
    ).fit()  # fmt: skip
    scale = float(result.state.opt_state[1].scale)
    assert scale < 1
    assert result.metrics['train/learning_rate'] == pytest.approx(1e-9 * scale)
    result = tiny.trainer(optimizer=LBFGS, evals={}, train_for='5 steps').fit()
    step = float(result.state.opt_state[-1].learning_rate)
    assert result.metrics['train/learning_rate'] == pytest.approx(step)
    caplog.clear()
    result = tiny.trainer(optimizer=OPTIMIZERS['momo'], **ONE).fit()
    assert 'train/learning_rate' not in result.metrics
    assert 'learning rate of config.optimizer is unknown' in caplog.text


@pytest.mark.slow
def test_groups_log_their_own_factors() -> None:
    groups = {
        'a': {**LBFGS, 'params': 'Dense_0/.*'},
        'b': {**ADAM, 'params': 'Dense_1/.*'},
    }
    result = tiny.trainer(optimizer={'groups': groups}, evals={}, train_for='5 steps').fit()
    inner = result.state.opt_state.inner_states['a'].inner_state
    assert result.metrics['train/learning_rate/a'] == pytest.approx(float(inner[-1].learning_rate))
    assert result.metrics['train/learning_rate/b'] == pytest.approx(0.01)


def without_gradients(state: Any, batch: Any, ctx: Any, *, gives: bool) -> Any:
    """A custom step with its own gradient, which passes the loss if `gives`."""

    def loss(params: Any) -> Any:
        return ctx.loss(ctx.task(ctx.bind(params), batch))

    value, grads = jax.value_and_grad(loss)(state.params)
    state, metrics = ctx.update(state, grads, **({'value': value} if gives else {}))
    return state, metrics


def step_per_example(state: Any, batch: Any, ctx: Any) -> Any:
    """A custom step with per-example gradients, as for differential privacy."""

    def loss(params: Any, row: Any) -> Any:
        return ctx.loss(ctx.task(ctx.bind(params), jax.tree.map(lambda x: x[None], row)))

    grads = jax.vmap(jax.grad(loss), (None, 0))(state.params, dict(batch))
    return ctx.update(state, grads)


@pytest.mark.slow
def test_custom_step_passes_the_loss_to_the_optimizer() -> None:
    """The loss of `ctx.gradients`, or one that the step passes itself."""
    last = {}
    steps: dict[str, Any] = {
        'default': None,
        'same': {'ref': 'tests.step.steps:same'},
        'by hand': {'target': f'{__name__}:without_gradients', 'gives': True},
    }
    for name, step in steps.items():
        options = {} if step is None else {'step': step}
        last[name] = tiny.trainer(optimizer=POLYAK, evals={}, train_for='3 steps', **options).fit()
    for name in ('same', 'by hand'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            last[name].state.params, last['default'].state.params,
        )  # fmt: skip
    twice = {'ref': 'tests.step.steps:twice'}
    assert tiny.trainer(optimizer=POLYAK, step=twice, **ONE).fit().status == 'finished'


@pytest.mark.slow
def test_per_example_gradients_in_a_custom_step() -> None:
    step = {'target': f'{__name__}:step_per_example'}
    result = tiny.trainer(optimizer=DPSGD, step=step, **ONE).fit()
    assert result.status == 'finished'


def warm() -> optax.GradientTransformationExtraArgs:
    """An optimizer that takes one extra argument and, against the convention, no other."""

    def update(updates: Any, state: Any, params: Any = None, *, temperature: float = 1.0) -> Any:
        del params
        return jax.tree.map(lambda g: -temperature * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def give(state: Any, batch: Any, ctx: Any, temperature: float) -> Any:
    grads, collections, metrics = ctx.gradients(state, batch)
    state, more = ctx.update(state, grads, collections, temperature=temperature)
    return state, {**metrics, **more}


def giving(temperature: float) -> Any:
    return functools.partial(give, temperature=temperature)


@pytest.mark.slow
def test_arguments_of_the_user_are_not_dropped() -> None:
    norms = []
    for temperature in (0.25, 1.0):
        step = {'target': f'{__name__}:giving', 'temperature': temperature}
        made = tiny.trainer(optimizer={'target': f'{__name__}:warm'}, step=step, **ONE)
        norms.append(made.fit().metrics['train/update_norm'])
    assert norms[1] == pytest.approx(4 * norms[0])


def wants_more() -> optax.GradientTransformationExtraArgs:
    """An optimizer that needs an argument that the trainer does not compute."""

    def update(updates: Any, state: Any, params: Any = None, *, weather: Any, **_: Any) -> Any:
        del params, weather
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def takes_value_only() -> optax.GradientTransformationExtraArgs:
    """An optimizer that, against the convention, takes no extra arguments."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        del params, value
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


DPSGD = {
    'target': 'optax.contrib:dpsgd', 'learning_rate': 0.1, 'l2_norm_clip': 1.0,
    'noise_multiplier': 0.1, 'seed': 0,
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    'lookahead': (
        {'optimizer': {'target': 'optax:lookahead', 'fast_optimizer': ADAM, 'sync_period': 5,
                       'slow_step_size': 0.5}},
        r'config\.optimizer: optax:lookahead needs two sets of parameters.*config\.ema',
    ),
    'dpsgd': ({'optimizer': DPSGD}, r'dpsgd.*needs a gradient of each example.*config\.step'),
    'in a group': (
        {'optimizer': {'groups': {'all': {**DPSGD, 'params': '.*'}}}},
        r'config\.optimizer\.groups\.all: optax\.contrib:dpsgd',
    ),
    'several batches': (
        {'optimizer': {'target': 'optax:MultiSteps', 'opt': POLYAK, 'every_k_schedule': 2}},
        r'needs value, which optax:MultiSteps cannot provide.*config\.accumulate',
    ),
    'another form': (
        {'optimizer': {'target': 'optax:flatten', 'inner': LBFGS}}, r'the optimizer failed: ',
    ),
    'beside what refuses it': (
        {'optimizer': chain({'target': 'optax.contrib:sam', 'optimizer': ADAM,
                             'adv_optimizer': {'target': 'optax:sgd', 'learning_rate': 0.1}},
                            {'target': 'optax.contrib:reduce_on_plateau'})},
        r'needs value, which optax\.contrib:sam, chained with it, does not accept',
    ),
    'masked by optax alone': (
        {'optimizer': {'target': 'optax:masked', 'inner': LBFGS,
                       'mask': {'ref': 'tests.step.perceptron:kernels'}}},
        r'(?s)the optimizer failed: .*mask_compatible_extra_args=True',
    ),
    'a loss scale': (
        {'optimizer': LBFGS, 'precision': {'compute': 'float16'}},
        r'computes the loss at other parameters.*loss_scale=0',
    ),
    'a step without the loss': (
        {'optimizer': POLYAK,
         'step': {'target': f'{__name__}:without_gradients', 'gives': False}},
        r'it needs value, and config\.step does not pass.*ctx\.update\(.*, value=\.\.\.\)',
    ),
    'what is not computed': (
        {'optimizer': {'target': f'{__name__}:wants_more'}},
        r'it needs weather, which the trainer does not compute.*grads, weather=\.\.\.\)',
    ),
    'against the convention': (
        {'optimizer': {'target': f'{__name__}:takes_value_only'}},
        r'unexpected keyword.*\*\*extra_args',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_unavailable_arguments_are_reported(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        tiny.trainer(**ONE, **options).fit()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('optimizer', 'logged'),
    [
        pytest.param(LBFGS, (), marks=pytest.mark.slow),
        (
            chain(
                ADAM,
                {
                    'target': 'optax.contrib:reduce_on_plateau', 'patience': 2,
                    'accumulation_size': 3,
                },
            ),
            ('args[0].learning_rate',),
        ),
    ],
)  # fmt: skip
def test_resume_is_bit_equal(
    optimizer: dict[str, Any], logged: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    """The losses that these optimizers keep are in the checkpoint."""
    options = {
        'optimizer': optimizer,
        'evals': {},
        'log': {'every': '5 steps', 'learning_rates': logged},
    }
    whole = tiny.trainer(tmp_path / 'whole', **options).fit()
    tiny.trainer(tmp_path / 'cut', **options).fit(max_steps=7)
    cut = tiny.trainer(tmp_path / 'cut', **options).fit()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(whole.state.durable),
        jax.device_get(cut.state.durable),
    )
    assert whole.metrics['train/learning_rate'] == cut.metrics['train/learning_rate']


def check(state: Any) -> Health:
    return check_arrays(state.health, state.params, state.opt_state, state.step)


@pytest.mark.slow
def test_failed_line_search_after_resume_is_not_a_failure() -> None:
    """Optax marks it by an infinite error, which does not mean that the run has failed."""
    trainer = tiny.trainer(optimizer=LBFGS, evals={}, train_for='3 steps')
    state = trainer.fit().state
    search = state.opt_state[-1]
    after = search._replace(info=search.info._replace(decrease_error=jnp.float32(jnp.inf)))
    assert bool(jnp.isfinite(search.info.decrease_error))
    healthy = state.replace(health=Health.from_arrays(state.params, state.opt_state))
    failed = healthy.replace(opt_state=(*state.opt_state[:-1], after))
    assert not bool(check(failed).is_bad)
    broken = search._replace(grad=jax.tree.map(lambda g: g * jnp.nan, search.grad))
    assert bool(check(healthy.replace(opt_state=(*state.opt_state[:-1], broken))).is_bad)
