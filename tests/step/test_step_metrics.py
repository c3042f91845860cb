# SPDX-License-Identifier: Apache-2.0
"""The norms of a step are equal for all ways of computing them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.step import step_metrics as norms_lib


def step_of(frozen: dict[str, bool], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two parameters that fit into a CPU cache, and one that does not."""
    rng = np.random.default_rng(0)
    shapes = {'small': (7,), 'less': (3, 4), 'large': (norms_lib._LARGE // 4, 5)}
    old = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    grads = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    updates = jax.tree.map(lambda g: (-0.1 * g).astype(dtype), grads)
    new = optax.apply_updates(old, updates)
    return dict(grads=grads, updates=updates, old=old, new=new, frozen=frozen)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    'frozen', [(), ('small',), ('large',), ('small', 'less'), ('small', 'less', 'large')]
)
def test_conditional_norms_equal_unconditional_ones(frozen: tuple[str, ...], dtype: Any) -> None:
    step = step_of({name: name in frozen for name in ('small', 'less', 'large')}, dtype)
    always = norms_lib.norms(**step, due=None)
    whole = jax.tree.map(lambda _: True, step['new'])
    joined = norms_lib.norms(**step, due=None, replicated=whole)

    @jax.jit
    def norms(arrays: Any, due: Any) -> Any:
        return norms_lib.norms(**arrays, frozen=step['frozen'], due=due)

    arrays = {name: x for name, x in step.items() if name != 'frozen'}
    found = norms(arrays, jnp.bool_(True))
    assert all(float(x) == 0 for x in norms(arrays, jnp.bool_(False)).values())
    for name, value in always.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name
        assert float(joined[name]) == pytest.approx(float(value), rel=1e-5), name
    trained = [name for name in ('small', 'less', 'large') if name not in frozen]
    grads = [np.asarray(step['grads'][name], np.float64).ravel() for name in trained]
    expected = np.linalg.norm(np.concatenate([*grads, [0.0]]))
    assert float(always['grad']) == pytest.approx(expected, rel=1e-5)
