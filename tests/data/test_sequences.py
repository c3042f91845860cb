# SPDX-License-Identifier: Apache-2.0
"""Sequences of different lengths: padded to the smallest length that a batch fits in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.data.loader import TrainLoader
from trainer.data.sequences import PaddedSequences


def items(*lengths: int) -> list[dict[str, Any]]:
    return [
        {'tokens': np.arange(1, n + 1, dtype=np.int32), 'label': np.int64(n), 'name': f'no. {n}'}
        for n in lengths
    ]


def source(*lengths: int, **options: Any) -> PaddedSequences:
    settings = {'fields': ('tokens',), 'lengths': (4, 8), **options}
    return PaddedSequences(items(*lengths), **settings)


def collate(*lengths: int, rows: int | None = None, **options: Any) -> dict[str, Any]:
    return source(*lengths, **options).collate(items(*lengths), rows or len(lengths))


def test_the_smallest_length_that_fits() -> None:
    assert collate(1, 4)['tokens'].shape == (2, 4)
    assert collate(1, 5)['tokens'].shape == (2, 8)
    assert source(1).num_shapes == 2


def test_padding_and_its_mask() -> None:
    batch = collate(2, 3)
    np.testing.assert_array_equal(batch['tokens'], [[1, 2, 0, 0], [1, 2, 3, 0]])
    np.testing.assert_array_equal(batch['is_real'], batch['tokens'] > 0)
    np.testing.assert_array_equal(batch['length'], [2, 3])
    np.testing.assert_array_equal(batch['label'], [2, 3])
    assert batch['length'].dtype == np.int32 and batch['name'].tolist() == ['no. 2', 'no. 3']


def test_padding_repeats_the_first_example() -> None:
    batch = collate(2, 3, rows=4)
    np.testing.assert_array_equal(batch['length'], [2, 3, 2, 2])
    np.testing.assert_array_equal(batch['tokens'][2:], [[1, 2, 0, 0]] * 2)


def test_the_value_of_padding() -> None:
    np.testing.assert_array_equal(collate(2, fill=-1)['tokens'], [[1, 2, -1, -1]])
    named = collate(2, fields=('tokens',), fill={'tokens': 9})
    np.testing.assert_array_equal(named['tokens'], [[1, 2, 9, 9]])
    with pytest.raises(ValueError, match="'label' is not among the fields tokens"):
        source(1, fill={'label': 1})


def test_sequences_of_vectors_and_nested_examples() -> None:
    examples = [{'inputs': {'x': np.ones((n, 2)), 'word': np.arange(n)}} for n in (1, 3)]
    made = PaddedSequences(examples, fields=('inputs/x', 'inputs/word'), lengths=(5,))
    batch = made.collate(examples, 2)
    assert batch['inputs']['x'].shape == (2, 5, 2) and batch['inputs']['word'].shape == (2, 5)
    np.testing.assert_array_equal(batch['length'], [1, 3])


def test_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match='has 9 elements, and the last of `lengths` is 8'):
        collate(9)
    batch = collate(9, 2, truncate=True)
    np.testing.assert_array_equal(batch['tokens'][0], np.arange(1, 9))
    np.testing.assert_array_equal(batch['length'], [8, 2])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match='expected names of fields'):
        source(1, fields='tokens')
    with pytest.raises(ValueError, match='expected positive numbers, ascending'):
        source(1, lengths=(8, 4))
    with pytest.raises(ValueError, match='has no examples'):
        source()
    with pytest.raises(ValueError, match='an example is a tuple; expected a dict of arrays'):
        PaddedSequences([(np.ones(2),)], fields=('0',), lengths=(4,)).collate([(np.ones(2),)], 1)
    with pytest.raises(ValueError, match="no field 'words'; it has tokens, label, name"):
        collate(1, fields=('words',))
    examples = [{'tokens': np.ones(2), 'tags': np.ones(3)}]
    with pytest.raises(ValueError, match='differ in length'):
        PaddedSequences(examples, fields=('tokens', 'tags'), lengths=(4,)).collate(examples, 1)
    other = [{'tokens': np.ones(n), 'tags': np.ones(n)} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"'tags' is float64 \(2,\), float64 \(3,\) in examples"):
        PaddedSequences(other, fields=('tokens',), lengths=(4,)).collate(other, 2)
    taken = [{'tokens': np.ones(2), 'length': 2}]
    with pytest.raises(ValueError, match="'length' is that of a field"):
        PaddedSequences(taken, fields=('tokens',), lengths=(4,)).collate(taken, 1)


def test_groups_of_similar_length() -> None:
    """Each epoch has every example once, in another order; most batches are short."""
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    examples = [{'tokens': np.zeros(n, np.int8)} for n in lengths]

    def loader(group: int | None, batch_size: int = 10) -> TrainLoader:
        made = PaddedSequences(examples, fields=('tokens',), lengths=(16, 32, 64), group=group)
        return TrainLoader(source=made, batch_size=batch_size, seed=1)

    def batch_lengths(group: int | None) -> list[int]:
        made = loader(group)
        return [made.block(step, 1).arrays['tokens'].shape[-1] for step in range(200)]

    assert sum(batch_lengths(None)) == pytest.approx(200 * 64, rel=0.02)
    # 200 x 44 if no batch had sequences of two lengths.
    assert sum(batch_lengths(40)) < 200 * 47
    ids, _ = loader(40).order(0, 400)
    epochs = ids.reshape(2, 2000)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(2000))
    assert (epochs[0] != epochs[1]).mean() > 0.9
    # Not in the order of their lengths: groups are shuffled.
    means = lengths[epochs[0]].reshape(50, 40).mean(1)
    assert abs(np.corrcoef(np.arange(50), means)[0, 1]) < 0.5
    # The order does not depend on the batch size.
    np.testing.assert_array_equal(loader(40, 16).order(0, 250)[0].ravel(), ids.ravel()[:4000])


class Measured(list[Any]):
    """Items that know their lengths."""

    def __init__(self, items: list[Any], lengths: Any):
        super().__init__(items)
        self.lengths = lengths

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError('an item is read')


def test_items_that_know_their_lengths_are_not_read() -> None:
    sizes = [3, 9, 1, 4]
    items = [{'tokens': np.zeros(n)} for n in sizes]
    options: dict[str, Any] = dict(fields=('tokens',), lengths=(16,), group=2)
    known = PaddedSequences(Measured(items, sizes), **options)
    order = np.array([2, 0, 3, 1])
    expected = PaddedSequences(items, **options).arrange(order, 0, 0)
    np.testing.assert_array_equal(known.arrange(order, 0, 0), expected)
    with pytest.raises(ValueError, match=r'`lengths` of the items has shape \(3,\); .* each of 4'):
        PaddedSequences(Measured(items, sizes[1:]), **options)
