# SPDX-License-Identifier: Apache-2.0
"""The filters of NNX's first README: modules as pytrees, and filters of their states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Net(nnx.Module):
    """Variables of each kind: two parameters, statistics, RNG state, a count."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32), tag='counted')

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        return self.drop(self.norm(self.linear(x)))


PARAMS = {'linear/kernel', 'linear/bias', 'norm/scale', 'norm/bias'}
STATS = {'norm/mean', 'norm/var'}
RNGS = {'drop/rngs/key', 'drop/rngs/count'}
COUNT = {'count'}
ALL = PARAMS | STATS | RNGS | COUNT


def paths(state: Any) -> set[str]:
    return {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def net() -> Net:
    return Net(nnx.Rngs(0))


def test_a_module_goes_through_jax_jit() -> None:
    """It is a pytree: changes within are returned, and the module outside is unchanged."""
    model = nnx.view(net(), deterministic=True, use_running_average=False)
    assert isinstance(model, nnx.Pytree)
    assert len(jax.tree.leaves(model)) == len(ALL)

    @jax.jit
    def step(model: Net, x: jax.Array) -> tuple[jax.Array, Net]:
        return model(x), model

    y, changed = step(model, X)
    assert isinstance(changed, Net) and changed is not model
    assert (int(model.count[...]), int(changed.count[...])) == (0, 1)
    assert np.array_equal(model.norm.mean[...], jnp.zeros(4))
    np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(changed.norm.mean[...], model.norm.mean[...], rtol=1e-5)
    doubled = jax.tree.map(lambda x: 2 * x if jnp.issubdtype(x.dtype, jnp.floating) else x, model)
    assert np.array_equal(doubled.linear.kernel[...], 2 * model.linear.kernel[...])


def test_the_ellipsis_filter() -> None:
    """`...` matches everything that no earlier filter matches; a split must be complete."""
    graph, params, rest = nnx.split(net(), nnx.Param, ...)
    assert (paths(params), paths(rest)) == (PARAMS, ALL - PARAMS)
    assert jax.tree.leaves(nnx.merge(graph, params, rest)(X))
    with pytest.raises(ValueError, match='Non-exhaustive'):
        nnx.split(net(), nnx.Param, nnx.BatchStat)
    with pytest.raises(ValueError, match='can only be used as the last filters'):
        nnx.split(net(), ..., nnx.Param)


def test_several_states_are_merged() -> None:
    """Merging the states in any order restores the module."""
    model = net()
    graph, stats, params, rest = nnx.split(model, nnx.BatchStat, nnx.Param, ...)
    for parts in ((stats, params, rest), (rest, stats, params)):
        again = nnx.merge(graph, *parts, copy=True)
        assert paths(nnx.state(again)) == ALL
        for ours, its in zip(*map(jax.tree.leaves, (model, again)), strict=True):
            assert np.array_equal(ours, its) or jnp.issubdtype(ours.dtype, jax.dtypes.prng_key)
    whole = nnx.merge_state(stats, params, rest)
    assert paths(whole) == ALL
    assert np.array_equal(whole['linear']['kernel'][...], model.linear.kernel[...])
    other = jax.tree.map(jnp.zeros_like, params)
    nnx.update(model, other, stats)
    assert not model.linear.kernel[...].any()


def test_states_are_filtered_and_split() -> None:
    """`nnx.filter_state` returns a part, `nnx.split_state` must be complete."""
    state = nnx.state(net())
    assert paths(nnx.filter_state(state, nnx.Param)) == PARAMS
    found = nnx.filter_state(state, nnx.Param, nnx.BatchStat)
    assert [paths(part) for part in found] == [PARAMS, STATS]
    found = nnx.split_state(state, nnx.Param, nnx.BatchStat, ...)
    assert [paths(part) for part in found] == [PARAMS, STATS, RNGS | COUNT]
    with pytest.raises(ValueError, match='Non-exhaustive'):
        nnx.split_state(state, nnx.Param)


def is_in_norm(path: Any, value: Any) -> bool:
    return 'norm' in path


@pytest.mark.parametrize(
    ('chosen', 'expected'),
    [
        (nnx.Param, PARAMS),
        (nnx.OfType(nnx.Param), PARAMS),
        (nnx.OfType(nnx.RngState), RNGS),
        (..., ALL),
        (True, ALL),
        (nnx.Everything(), ALL),
        (None, set()),
        (False, set()),
        (nnx.Nothing(), set()),
        (nnx.PathContains('norm'), STATS | {'norm/scale', 'norm/bias'}),
        (is_in_norm, STATS | {'norm/scale', 'norm/bias'}),
        ((nnx.BatchStat, nnx.RngState), STATS | RNGS),
        ([nnx.BatchStat, is_in_norm], STATS | {'norm/scale', 'norm/bias'}),
        (nnx.Any(nnx.BatchStat, 'counted'), STATS | COUNT),
        (nnx.All(nnx.Param, is_in_norm), {'norm/scale', 'norm/bias'}),
        (nnx.Not(nnx.Param), ALL - PARAMS),
        (nnx.Not(nnx.Any(nnx.Param, nnx.RngState)), STATS | COUNT),
        (nnx.WithTag('counted'), COUNT),
        ('counted', COUNT),
    ],
)
def test_filters(chosen: Any, expected: set[str]) -> None:
    """The variables that each filter matches."""
    assert paths(nnx.state(net(), chosen)) == expected
