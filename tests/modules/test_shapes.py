# SPDX-License-Identifier: Apache-2.0
"""Descriptions of shapes, and of differences between trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.modules import shapes


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (np.zeros((3, 4), np.float32), 'float32[3, 4]'),
        (jax.ShapeDtypeStruct((), jnp.bfloat16), 'bfloat16[]'),
        (None, 'absent'),
        (3, 'int'),
    ],
)
def test_a_value_is_described_by_dtype_and_shape(value: Any, text: str) -> None:
    assert shapes.describe(value) == text


def test_changes_name_the_leaves_in_the_order_of_the_tree() -> None:
    before = {'b': np.zeros(2), 'c': np.zeros(3, np.int32), 'same': np.zeros(1)}
    after = {'a': np.zeros(()), 'b': np.zeros((2, 1)), 'same': np.ones(1)}
    assert shapes.changes(before, after) == (
        'b: float64[2] -> float64[2, 1]; c: int32[3] -> absent; a: absent -> float64[]'
    )
    assert shapes.changes(before, before) == ''


def test_many_changes_are_counted() -> None:
    before = {f'layer_{i}': np.zeros(1) for i in range(9)}
    text = shapes.changes(before, {})
    assert text.count(';') == 4 and text.endswith('layer_4: float64[1] -> absent and 4 more')
