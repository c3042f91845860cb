# SPDX-License-Identifier: Apache-2.0
"""The global order: a pure function of (seed, position), every example once in each epoch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data.order import Order, epoch_order

GOLDEN = [
    [4, 5, 7, 0, 9, 2, 6, 1, 8, 3],
    [0, 1, 6, 4, 2, 9, 7, 3, 5, 8],
    [4, 8, 5, 3, 7, 2, 0, 1, 9, 6],
]


def test_golden_order() -> None:
    """What a seed means must never change: resumed runs and published figures rest on it."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN[0]
    assert epoch_order(10, 0, 1).tolist() == GOLDEN[1]
    assert epoch_order(10, 1, 0).tolist() == GOLDEN[2]


def test_carry_crosses_the_epoch_border() -> None:
    order = Order(examples=10, batch_size=4)
    ids, epochs = order.rows(0, 5)
    assert order.steps_per_epoch == Fraction(5, 2)
    assert sorted(ids.ravel()[:10]) == sorted(ids.ravel()[10:]) == list(range(10))
    assert epochs.tolist() == [[0] * 4, [0] * 4, [0, 0, 1, 1], [1] * 4, [1] * 4]
    assert ids.ravel().tolist() == [*GOLDEN[0], *GOLDEN[1]]


def test_pad_fills_up_with_padding() -> None:
    order = Order(examples=10, batch_size=4, remainder='pad')
    ids, _ = order.rows(0, 6)
    assert order.steps_per_epoch == 3
    assert ids[2].tolist() == [*GOLDEN[0][8:], -1, -1]
    assert sorted(ids[:3].ravel())[2:] == sorted(ids[3:].ravel())[2:] == list(range(10))


def test_drop_leaves_the_rest_out() -> None:
    order = Order(examples=10, batch_size=4, remainder='drop')
    ids, _ = order.rows(0, 4)
    assert order.steps_per_epoch == 2
    assert ids[:2].ravel().tolist() == GOLDEN[0][:8]
    assert ids[2:].ravel().tolist() == GOLDEN[1][:8]
    with pytest.raises(ValueError, match="use 'carry' or 'pad'"):
        Order(examples=3, batch_size=4, remainder='drop')


@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_starting_in_the_middle(remainder: str) -> None:
    order = Order(examples=10, batch_size=4, remainder=remainder)
    np.testing.assert_array_equal(order.rows(0, 20)[0][7:], order.rows(7, 13)[0])


def test_no_shuffle() -> None:
    ids, _ = Order(examples=3, batch_size=2, shuffle=False).rows(0, 3)
    assert ids.tolist() == [[0, 1], [2, 0], [1, 2]]
