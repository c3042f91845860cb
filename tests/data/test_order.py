# SPDX-License-Identifier: Apache-2.0
"""The global order: a pure function of seed and position, with every example once per epoch."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from trainer.data.order import Order, epoch_order, replay_batch_sizes

GOLDEN = [
    [4, 5, 7, 0, 9, 2, 6, 1, 8, 3],
    [0, 1, 6, 4, 2, 9, 7, 3, 5, 8],
    [4, 8, 5, 3, 7, 2, 0, 1, 9, 6],
]


def test_golden_order() -> None:
    """The order of a seed must never change: resumed runs and published results depend on it."""
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


def test_pad_fills_the_last_batch() -> None:
    order = Order(examples=10, batch_size=4, remainder='pad')
    ids, _ = order.rows(0, 6)
    assert order.steps_per_epoch == 3
    assert ids[2].tolist() == [*GOLDEN[0][8:], -1, -1]
    assert sorted(ids[:3].ravel())[2:] == sorted(ids[3:].ravel())[2:] == list(range(10))


def test_drop_omits_the_incomplete_batch() -> None:
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


@pytest.mark.parametrize(
    ('remainder', 'steps', 'expected'),
    [
        ('carry', '5/2', [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]),
        ('pad', '3', [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1], [0, 1, 2, 3], [4, 5, 6, 7]]),
        ('drop', '2', [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]),
    ],
)
def test_ten_examples_in_batches_of_four(
    remainder: str, steps: str, expected: list[list[int]]
) -> None:
    order = Order(examples=10, batch_size=4, shuffle=False, remainder=remainder)
    assert order.rows(0, 5)[0].tolist() == expected
    assert order.steps_per_epoch == Fraction(steps)


@pytest.mark.parametrize(('remainder', 'expected'), [('pad', [0, 0, 0, 1]), ('drop', [0, 0, 1, 1])])
def test_epochs_of_whole_batches(remainder: str, expected: list[int]) -> None:
    _, epochs = Order(examples=10, batch_size=4, remainder=remainder).rows(0, 4)
    assert epochs.tolist() == [[epoch] * 4 for epoch in expected]


@pytest.mark.parametrize(('examples', 'batch_size'), [(1, 1), (7, 7), (1000, 32), (5, 12)])
@pytest.mark.parametrize('remainder', ['carry', 'pad'])
def test_each_epoch_has_every_example_once(examples: int, batch_size: int, remainder: str) -> None:
    order = Order(examples=examples, batch_size=batch_size, seed=7, remainder=remainder)
    ids, epochs = order.rows(0, 3 * (-(-examples // batch_size)) + 1)
    for epoch in range(3):
        seen = ids[(epochs == epoch) & (ids >= 0)]
        assert sorted(seen.tolist()) == list(range(examples))


def test_dropped_examples_are_used_in_other_epochs() -> None:
    ids, epochs = Order(examples=10, batch_size=4, remainder='drop').rows(0, 40)
    for epoch in range(20):
        assert len(set(ids[epochs == epoch].tolist())) == 8
    assert set(ids.ravel().tolist()) == set(range(10))


def test_seeds_and_epochs_differ() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in range(10) for epoch in range(10)]
    assert len({order.tobytes() for order in orders}) == 100


def test_changing_returned_rows_does_not_change_the_order() -> None:
    for shuffle in (True, False):
        order = Order(examples=10, batch_size=5, shuffle=shuffle)
        before = order.rows(0, 2)[0]
        order.rows(0, 2)[0][:] = 3
        np.testing.assert_array_equal(order.rows(0, 2)[0], before)


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a batch across its border is read again, and if two orders alternate."""
    sorted_epochs = []

    def count_epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
        sorted_epochs.append((seed, epoch))
        return epoch_order(examples, seed, epoch)

    monkeypatch.setattr('trainer.data.order.epoch_order', count_epoch_order)
    orders = [Order(examples=10, batch_size=4, seed=seed) for seed in range(3)]
    for step in (0, 1, 2, 2, 2, 3, 4):
        for order in orders:
            order.rows(step, 1)
    assert sorted(sorted_epochs) == [(seed, epoch) for seed in range(3) for epoch in range(2)]


@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_dtypes_and_shapes(remainder: str) -> None:
    for count in (1, 3, 30):
        for x in Order(examples=10, batch_size=4, remainder=remainder).rows(7, count):
            assert (x.dtype, x.shape) == (np.int64, (count, 4))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"expected 'carry', 'pad' or 'drop', got 'wrap'"):
        Order(examples=10, batch_size=4, remainder='wrap')
    for examples, batch_size in [(0, 4), (10, 0), (10, -1)]:
        with pytest.raises(ValueError, match='both must be positive'):
            Order(examples=examples, batch_size=batch_size)
    assert Order(examples=4, batch_size=4, remainder='drop').steps_per_epoch == 1


SIZES = {
    'one change': ((0, 4), (5, 8)),
    'smaller': ((0, 8), (3, 2)),
    'several': ((0, 4), (3, 8), (5, 2), (11, 3)),
    'within an epoch and within its rest': ((0, 3), (1, 2), (2, 5), (3, 1)),
}


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('examples', [10, 16, 23])
def test_batches_of_a_new_size_continue_the_order(
    examples: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    """The concatenated rows of all batches equal those of a run with one batch size."""
    whole = Order(examples=examples, batch_size=1).rows(0, 400)
    ids, epochs = rows_of(Order(examples=examples, batch_size=sizes[-1][1]), sizes, steps=40)
    np.testing.assert_array_equal(ids, whole[0].ravel()[: len(ids)])
    np.testing.assert_array_equal(epochs, whole[1].ravel()[: len(ids)])


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('examples', [10, 16, 23])
@pytest.mark.parametrize('remainder', ['pad', 'drop'])
def test_the_end_of_an_epoch_after_a_change_of_the_batch_size(
    remainder: str, examples: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    order = Order(examples=examples, batch_size=sizes[-1][1], remainder=remainder)
    ids, epochs = rows_of(order, sizes, steps=40)
    assert (np.diff(epochs) >= 0).all()
    for epoch in range(epochs[-1]):
        seen = [i for i in ids[epochs == epoch].tolist() if i >= 0]
        shuffled = epoch_order(examples, 0, epoch).tolist()
        assert seen == shuffled[: len(seen)]
        if remainder == 'pad':
            assert len(seen) == examples
        else:
            assert -1 not in ids
            assert examples - len(seen) < max(size for _, size in sizes)


def rows_of(
    order: Order, sizes: tuple[tuple[int, int], ...], *, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and epochs of all rows of a run with these batch sizes."""
    ids, epochs = [], []
    for number, (start, size) in enumerate(sizes, start=1):
        stop = sizes[number][0] if number < len(sizes) else steps
        sized = dataclasses.replace(order, batch_size=size)
        found = replay_batch_sizes(sized, sizes[:number])[0].rows(start, stop - start)
        ids.append(found[0].ravel())
        epochs.append(found[1].ravel())
    return np.concatenate(ids), np.concatenate(epochs)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_consumed_epochs_match_the_rows(remainder: str, sizes: tuple[tuple[int, int], ...]) -> None:
    order = Order(examples=23, batch_size=sizes[-1][1], remainder=remainder)
    moved, marks = replay_batch_sizes(order, sizes)
    assert marks == tuple(sorted(marks))
    for step in range(sizes[-1][0] + 1, 40):
        epochs = moved.rows(step - 1, 1)[1]
        assert epochs.max() <= moved.epochs(step) <= epochs.max() + 1
        assert moved.epochs(step - 1) < moved.epochs(step)
    assert marks[-1][1] == moved.epochs(math.ceil(marks[-1][0])) * order.steps_per_epoch - (
        math.ceil(marks[-1][0]) - marks[-1][0]
    )


def test_an_order_without_changes_has_no_marks() -> None:
    order = Order(examples=23, batch_size=4)
    assert replay_batch_sizes(order, ((0, 4),)) == (order, ())
    # And one that had other sizes begins again.
    assert replay_batch_sizes(replay_batch_sizes(order, ((0, 3), (5, 4)))[0], ((0, 4),)) == (
        order,
        (),
    )
