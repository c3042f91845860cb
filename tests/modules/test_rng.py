# SPDX-License-Identifier: Apache-2.0
"""Random keys of a run: functions of the seed and the place, different at each place."""

from __future__ import annotations

import itertools

import jax
import numpy as np

from trainer.modules.rng import Keys


def data(keys: Keys, name: str = 'dropout') -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(keys.stream(name))).tolist())


def test_every_place_has_its_own_key() -> None:
    places = itertools.product((0, 1), ('init', 'train', 'eval'), (0, 1, 2), (0, 1, 2))
    found = [
        data(Keys(seed=seed, mode=mode, step=step, index=index), name)
        for seed, mode, step, index in places
        for name in ('dropout', 'noise')
    ]
    assert len(set(found)) == len(found) == 108


def test_keys_are_the_same_in_every_run() -> None:
    """Other keys would change the parameters and dropout masks of existing seeds."""
    assert data(Keys(seed=3, mode='train', step=7, index=1)) == (3469378789, 2826273617)
    key = Keys(seed=3, mode='train', step=7, index=1).stream('dropout')
    assert key.shape == () and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_traced_places_give_the_same_keys() -> None:
    def key_of_step(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.key_data(Keys(seed=seed, mode='eval', step=step).stream('noise'))

    found = tuple(np.asarray(jax.jit(key_of_step)(3, 7)).tolist())
    assert found == data(Keys(seed=3, mode='eval', step=7), 'noise')
