# SPDX-License-Identifier: Apache-2.0
"""Transfers from the devices to the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainer.parallel.host import fetch
from trainer.parallel.mesh import make_mesh


def test_a_tree_keeps_its_structure_and_values() -> None:
    sharding = NamedSharding(make_mesh({'data': -1}), PartitionSpec('data'))
    given = {'sharded': jax.device_put(np.arange(16), sharding), 'pair': (jnp.float32(2), None)}
    found = fetch(given)
    assert isinstance(found['sharded'], np.ndarray)
    assert found['sharded'].tolist() == list(range(16))
    assert found['pair'][0] == 2 and found['pair'][1] is None


def test_the_error_of_the_program_is_raised() -> None:
    def fail(x: Any) -> Any:
        raise RuntimeError('of the host')

    def program(x: jax.Array) -> jax.Array:
        return jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), x)

    with pytest.raises(Exception, match='of the host'):
        fetch(jax.jit(program)(jnp.float32(1)))
