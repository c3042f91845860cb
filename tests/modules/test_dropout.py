# SPDX-License-Identifier: Apache-2.0
"""The guide to dropout: its keys, when they change, and what is dropped."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.parallel.mesh import make_mesh
from trainer.parallel.sharding import ByPath
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.optimizer import Optimizer
from trainer.step.programs import Programs
from trainer.tasks import TaskOutput
from trainer.tasks.runner import TaskRunner


class Net(nn.Module):
    """Ones, of which some are dropped, and a parameter."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, ())
        return scale * nn.Dropout(self.rate, deterministic=not train)(jnp.ones_like(x))


class Fitted(nn.Module):
    """Ones, of which some are dropped, and a parameter that starts as the mean of what is kept."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kept = nn.Dropout(self.rate, deterministic=not train)(jnp.ones_like(x))
        return kept - self.param('level', lambda _: kept.mean(0))


def test_each_stream_has_its_own_keys() -> None:
    """One seed gives a key for each stream, mode, step and micro-batch."""
    names = ('params', 'dropout', 'noise')
    places = [
        Keys(seed=seed, mode=mode, step=step, index=index).stream(name)
        for seed in (0, 1)
        for mode in ('init', 'train', 'eval')
        for step in (0, 1)
        for index in (0, 1)
        for name in names
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in places}) == len(places)


def test_initialization_needs_no_dropout() -> None:
    """Parameters do not depend on it, and no key for it is requested."""
    batch = {'x': jnp.zeros((4, 8))}
    keys = Keys(seed=0, mode='init')
    found = [as_functional(Net(rate)).init(task, batch, keys)['params'] for rate in (0.0, 0.5)]
    assert found[0] == found[1] == {'scale': 1.0}
    # Here they would depend on it, if anything were dropped.
    fitted = [as_functional(Fitted(rate)).init(task, batch, keys)['params'] for rate in (0.0, 0.5)]
    assert fitted[0]['level'].tolist() == fitted[1]['level'].tolist() == [1.0] * 8
    variables = Net().init({'params': jax.random.key(0)}, jnp.zeros((4, 8)))
    assert set(variables) == {'params'}


def task(model: Any, batch: Any) -> TaskOutput:
    out = model(batch['x'])
    return TaskOutput(loss=out.mean(-1), metrics={'zeros': (out == 0).mean(-1)})


def test_deterministic_is_passed_once() -> None:
    """In the constructor or in the call; in none or in both it is an error."""
    x = jnp.ones((4, 8))
    rngs = {'dropout': jax.random.key(0)}
    in_call = nn.Dropout(0.5).apply({}, x, deterministic=False, rngs=rngs)
    in_constructor = nn.Dropout(0.5, deterministic=False).apply({}, x, rngs=rngs)
    assert np.array_equal(in_call, in_constructor)
    for layer, given in (
        (nn.Dropout(0.5), {}),
        (nn.Dropout(0.5, deterministic=True), {'deterministic': True}),
    ):
        with pytest.raises(ValueError, match='deterministic'):
            layer.apply({}, x, rngs=rngs, **given)
    for times in (0, 1, 2):
        model = as_functional(FlagTimes(times)).bind({'params': {}}, Keys(seed=0, mode='train'))
        if times == 1:
            assert (model(x) == 0).any()
            continue
        with pytest.raises(ValueError, match='deterministic'):
            model(x)


class FlagTimes(nn.Module):
    """Passes the flag to its dropout zero, one or two times."""

    times: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        constructor = {'deterministic': not train} if self.times == 2 else {}
        call = {'deterministic': not train} if self.times else {}
        return nn.Dropout(0.5, **constructor)(x, **call)


def test_kept_units_are_scaled_up() -> None:
    """With a rate of one half ones become zeros and twos; `rate` is what is dropped."""
    keys = Keys(seed=0, mode='train')
    for rate, kept in ((0.5, 2.0), (0.2, 1.25)):
        model = as_functional(Net(rate)).bind({'params': {'scale': jnp.ones(())}}, keys)
        out = np.asarray(model(jnp.ones((100, 100))))
        assert set(np.unique(out).round(5)) == {0.0, kept}
        assert out.mean() == pytest.approx(1.0, abs=0.03)
        assert (out == 0).mean() == pytest.approx(rate, abs=0.02)
    whole = nn.Dropout(0.5, broadcast_dims=(0,), deterministic=False)
    out = whole.apply({}, jnp.ones((6, 50)), rngs={'dropout': jax.random.key(0)})
    assert all(np.array_equal(row, out[0]) for row in out)


@pytest.mark.slow
def test_shards_of_a_batch_have_different_masks() -> None:
    """Parameters and masks equal those on one device."""
    x = np.ones((16, 64), 'f4')
    zeros, parameters = [], []
    cut = ByPath(rules=(('shifts', ('model',)),))
    for mesh, rules in (({'data': 8}, ()), ({'data': 2, 'model': 4}, (cut,))):
        step = TrainStep(StepContext(
            model=as_functional(Shifted()), task=TaskRunner.from_task(rows_of_masks), seed=3,
            optimizer=Optimizer(base=optax.sgd(0.0))
))  # fmt: skip
        spec = {'x': jax.ShapeDtypeStruct(x.shape, x.dtype)}
        program = Programs(step, spec, make_mesh(mesh), sharding=rules)
        batch = jax.device_put({'x': x}, program.step.executable().input_shardings[0][1])
        state = program.init()
        parameters.append(jax.device_get(state.params))
        state = program.step(state, batch)
        metrics = state.metrics['task']
        zeros.append([float(getattr(metrics, f'row{i}').compute()) for i in range(16)])
    assert zeros[0] == zeros[1]
    assert len(set(zeros[0])) > 8
    jax.tree.map(np.testing.assert_array_equal, *parameters)
    assert len(set(parameters[0]['shifts'].tolist())) == 64


class Shifted(nn.Module):
    """Masks, and parameters that do not affect them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shifts = self.param('shifts', nn.initializers.normal(), x.shape[-1:])
        return Net()(x + shifts, train)


def rows_of_masks(model: Any, batch: Any) -> TaskOutput:
    """Encodes the zeros of each example's mask as a number."""
    out = model(batch['x'])
    codes = ((out == 0) * (1 + jnp.arange(out.shape[1]))).sum(-1)
    each = {f'row{i}': jnp.full(len(out), codes[i]) for i in range(16)}
    return TaskOutput(loss=out.mean(-1), metrics=each)


class WordDropout(nn.Module):
    """Replaces random words of each text by an unknown word in training."""

    rate: float
    unknown: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        if not train:
            return tokens
        dropped = jax.random.bernoulli(self.make_rng('words'), self.rate, tokens.shape)
        return jnp.where(dropped, self.unknown, tokens)


class Texts(nn.Module):
    """An embedding with word dropout, and noise of another stream."""

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        tokens = WordDropout(0.25)(tokens, train)
        self.sow('intermediates', 'unknown', tokens == 1)
        x = nn.Embed(10, 4)(tokens).mean(1)
        if train:
            x = x + 0.1 * jax.random.normal(self.make_rng('noise'), x.shape)
        return nn.Dense(2)(x)


@pytest.mark.slow
def test_word_dropout_has_its_own_stream() -> None:
    """Two undeclared streams, new in each step, none in evaluation."""
    model = as_functional(Texts())
    tokens = jnp.full((64, 20), 5)

    def run(model: Any, batch: Any) -> jax.Array:
        return model(batch['tokens'])[:, 0]

    variables = model.init(run, {'tokens': tokens}, Keys(seed=0, mode='init'))
    masks = []
    for step in (0, 1, 1):
        bound = model.bind(variables, Keys(seed=0, mode='train', step=step))
        bound(tokens)
        (unknown,) = bound.intermediates['unknown']
        masks.append(np.asarray(unknown))
    assert masks[0].mean() == pytest.approx(0.25, abs=0.05)
    assert np.array_equal(masks[1], masks[2]) and not np.array_equal(masks[0], masks[1])
    bound = model.bind(variables, Keys(seed=0, mode='eval'))
    bound(tokens)
    assert not np.any(bound.intermediates['unknown'][0])
