# SPDX-License-Identifier: Apache-2.0
"""The same call of a model is made once in a program, and its result is used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trainer.modules.functional import as_functional
from trainer.modules.reuse import reuse_calls
from trainer.modules.rng import Keys

calls: list[str] = []


class Net(nn.Module):
    """One layer, noise and a sown value; records that it is traced."""

    def setup(self) -> None:
        self.out = nn.Dense(2)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        calls.append('call')
        noise = jax.random.normal(self.make_rng('default'), (2,))
        self.sow('intermediates', 'noise', noise)
        return {'logits': self.out(x) + noise}

    def encode(self, x: jax.Array) -> jax.Array:
        calls.append('encode')
        return self.out(x)


class NNXNet(nnx.Module):
    """One layer; records that it is traced."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        calls.append('call')
        return {'logits': self.out(x)}


def run(task: Callable[[Any, Any, jax.Array], Any], kind: type = Net) -> Any:
    """Runs a task with two models that are bound alike, in one program."""
    functional = as_functional(kind() if kind is Net else lambda rngs: kind(rngs=rngs))
    x = jnp.ones((3, 4))
    variables = functional.init(lambda model, x: model(x), x, Keys(seed=0, mode='init'))
    calls.clear()

    @jax.jit
    def program(variables: Any, x: jax.Array) -> Any:
        keys = Keys(seed=0, mode='eval')
        one, two = functional.bind(variables, keys), functional.bind(variables, keys)
        with reuse_calls():
            return task(one, two, x)

    return program(variables, x)


@pytest.mark.parametrize('kind', [Net, NNXNet])
def test_the_same_call_is_made_once(kind: type) -> None:
    def task(one: Any, two: Any, x: jax.Array) -> Any:
        first = one(x)
        expected = first['logits']
        # What a task does to the output is its own.
        first['logits'] = first['logits'] * 0
        return expected, two(x)['logits'], one.intermediates, two.intermediates

    expected, found, sown, sown_again = run(task, kind)
    np.testing.assert_array_equal(found, expected)
    assert jax.tree.map(np.asarray, sown_again).keys() == sown.keys()
    assert calls == ['call']


@pytest.mark.parametrize(
    ('other', 'made'),
    [
        (lambda one, two, x: two(x + 1), ['call', 'call']),
        (lambda one, two, x: two.encode(x), ['call', 'encode']),
        (lambda one, two, x: two.stop_gradient('out/.*')(x), None),
        # The second call of a model draws other random numbers.
        (lambda one, two, x: one(x), ['call', 'call']),
    ],
)
def test_other_calls_are_made(other: Callable[..., Any], made: list[str] | None) -> None:
    first, second = run(lambda one, two, x: (one(x), other(one, two, x)))
    if made is None:
        np.testing.assert_array_equal(first['logits'], second['logits'])
    else:
        assert calls == made
        assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])


def test_values_of_a_transformation_stay_in_it() -> None:
    def task(one: Any, two: Any, x: jax.Array) -> Any:
        # The model closes over the same `x`, but its output belongs to the transformation.
        slopes = jax.grad(lambda scale: (one(x)['logits'] * scale).sum())(1.0)
        return slopes, two(x)['logits'].sum()

    slope, total = run(task)
    np.testing.assert_allclose(slope, total, rtol=1e-6)
