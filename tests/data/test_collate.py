# SPDX-License-Identifier: Apache-2.0
"""Sources that collate: which examples a batch has, where its padding is, and what runs when."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests import ragged
from trainer.data.collate import Collator
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import Block, EvalLoader, TrainLoader
from trainer.data.mixture import Mixture
from trainer.data.nested import leaves_with_names
from trainer.data.streaming import StreamLoader
from trainer.data.transforms import PerExample


class Ragged:
    """Examples of 1 to 5 elements; a batch has them one after the other, in 32 places."""

    left: int

    def __init__(self, n: int = 10, padding_rows: int = 0, num_shapes: int = 1):
        self.n, self.padding_rows, self.num_shapes = n, padding_rows, num_shapes

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'x': np.full(index % 5 + 1, float(index), np.float32), 'id': index}

    def collate(self, examples: list[Any], rows: int) -> dict[str, Any]:
        x = np.concatenate([example['x'] for example in examples])
        ids = [example['id'] for example in examples]
        return {
            'x': np.pad(x, (0, 32 - len(x))),
            'id': np.array(ids + [-7] * (rows - len(ids))),
            'total': sum(map(len, (example['x'] for example in examples))),
        }


def make(**options: Any) -> TrainLoader:
    return TrainLoader(**{'source': Ragged(), 'batch_size': 4, 'shuffle': False, **options})


def assert_equal(one: Block, other: Block) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    (a, b) = (leaves_with_names(each.arrays) for each in (one, other))
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])


def test_a_batch_is_what_the_source_collates() -> None:
    block = make().block(0, 1)
    np.testing.assert_array_equal(block.ids, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(block.arrays['id'], [[0, 1, 2, 3]])
    x = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    np.testing.assert_array_equal(block.arrays['x'], [x + [0] * 22])
    np.testing.assert_array_equal(block.arrays['total'], [10])
    assert block.arrays['_mask'].all()


def test_examples_follow_the_order_of_other_sources() -> None:
    shuffled = make(shuffle=True, seed=3)
    ids, _ = shuffled.order(0, 7)
    for step in range(7):
        block = shuffled.block(step, 1)
        np.testing.assert_array_equal(block.ids, ids[step : step + 1])
        np.testing.assert_array_equal(block.arrays['id'], block.ids)


def test_several_steps_of_one_shape_are_stacked() -> None:
    whole = make().block(0, 3)
    assert whole.arrays['x'].shape == (3, 32)
    for step in range(3):
        np.testing.assert_array_equal(make().block(step, 1).arrays['x'][0], whole.arrays['x'][step])


def test_batches_of_different_shapes_are_not_stacked() -> None:
    loader = TrainLoader(source=ragged.sentences(), batch_size=2)
    with pytest.raises(ValueError, match='different shapes cannot be stacked'):
        loader.block(0, 20)


def test_places_beyond_the_batch_size_are_padding() -> None:
    loader = make(source=Ragged(padding_rows=2))
    block = loader.block(0, 1)
    assert loader.rows == 6
    np.testing.assert_array_equal(block.ids, [[0, 1, 2, 3, -1, -1]])
    np.testing.assert_array_equal(block.arrays['_mask'], block.ids >= 0)
    np.testing.assert_array_equal(block.arrays['id'], [[0, 1, 2, 3, -7, -7]])


def test_the_end_of_an_epoch_is_padded() -> None:
    block = make(remainder='pad').block(2, 1)
    np.testing.assert_array_equal(block.ids, [[8, 9, -1, -1]])
    np.testing.assert_array_equal(block.arrays['id'], [[8, 9, -7, -7]])


@pytest.mark.parametrize(
    ('padding_rows', 'padded_to', 'rows'), [(0, None, 4), (1, None, 5), (1, 8, 8)]
)
def test_an_evaluation_has_every_example_once(
    padding_rows: int, padded_to: int | None, rows: int
) -> None:
    source = Ragged(padding_rows=padding_rows)
    loader = EvalLoader(source=source, batch_size=4, padded_to=padded_to)
    blocks = [loader.block(i, 1) for i in range(loader.num_batches)]
    assert loader.rows == rows and all(block.ids.shape == (1, rows) for block in blocks)
    ids = np.concatenate([block.ids[block.ids >= 0] for block in blocks])
    np.testing.assert_array_equal(ids, np.arange(10))
    for block in blocks:
        np.testing.assert_array_equal(block.arrays['_mask'], block.ids >= 0)
        assert loader.spec['id'].shape == (rows,)


def test_an_evaluation_has_no_threads() -> None:
    with pytest.raises(ValueError, match=r'threads: 2; expected .* 1 for a source that collates'):
        EvalLoader(source=Ragged(), batch_size=4, threads=2)


def test_every_process_gets_whole_batches() -> None:
    """`rows` does not matter: what is in a batch may depend on all of its examples."""
    some = np.array([1, 3])
    assert_equal(make().block(1, 1, rows=some), make().block(1, 1))
    evaluation = EvalLoader(source=Ragged(), batch_size=4)
    assert_equal(evaluation.block(1, 1, rows=some), evaluation.block(1, 1))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_threads_and_processes_make_the_same_batches(workers: int) -> None:
    source = ragged.molecules(num_shapes=1)
    grain = GrainLoader(source=source, batch_size=3, workers=workers, remainder='pad', task_rows=2)
    other = TrainLoader(source=source, batch_size=3, remainder='pad')
    try:
        assert (grain.rows, grain.num_shapes) == (4, 1)
        for step, count in ((0, 1), (1, 3), (13, 1)):
            assert_equal(grain.block(step, count), other.block(step, count))
    finally:
        grain.close()


def test_the_first_example_and_the_spec() -> None:
    loader = make(source=Ragged(padding_rows=1), shuffle=True)
    np.testing.assert_array_equal(loader.first['id'], [0, -7, -7, -7, -7])
    assert loader.spec['x'].shape == (32,) and loader.spec['id'].shape == (5,)
    assert loader.spec['_mask'].dtype == bool and loader.spec['total'].shape == ()


def add_noise(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**example, 'x': example['x'] + rng.normal(size=example['x'].shape)}


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A transform of batches."""

    def __call__(self, batch: Any) -> Any:
        return {**batch, 'x': batch['x'] * 2}


def test_transforms_of_examples_run_before_and_of_batches_after() -> None:
    noisy = PerExample(fn=add_noise)
    loader = make(transforms=(noisy, Doubled()))
    batch = loader.block(0, 1).arrays['x'][0]
    assert batch.shape == (32,) and not batch[10:].any()
    plain = make().block(0, 1).arrays['x'][0]
    assert (batch[:10] != 2 * plain[:10]).all()
    # The numbers of an example depend on its epoch and on itself, not on its batch.
    alone = make(batch_size=1, transforms=(noisy,)).block(3, 1).arrays['x'][0, :4]
    np.testing.assert_allclose(batch[6:10], 2 * alone, rtol=1e-6)


def test_a_transform_of_batches_draws_for_each_place() -> None:
    def shift(batch: Any, rng: Any) -> Any:
        return {**batch, 'shift': rng.uniform()}

    batch = make(source=Ragged(padding_rows=1), transforms=(shift,)).block(0, 1).arrays
    assert batch['shift'].shape == (1, 5)
    assert len(np.unique(batch['shift'])) == 5


def test_a_transform_of_examples_after_one_of_batches_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r'transforms\[1\] .* of single examples.*move it to the end'
    ):
        make(transforms=(Doubled(), PerExample(fn=add_noise)))


def test_only_these_loaders_collate() -> None:
    with pytest.raises(ValueError, match='a stream does not call the collate of Ragged'):
        StreamLoader(source=Ragged(), batch_size=4)
    with pytest.raises(TypeError, match='Ragged makes whole batches with its method collate'):
        Mixture(sources=(Ragged(), Ragged()), weights=(1.0, 1.0))


def test_a_run_continues_with_another_batch_size() -> None:
    loader = make(source=Ragged(padding_rows=1), batch_size=4).after([(0, 2), (3, 4)])
    block = loader.block(3, 2)
    np.testing.assert_array_equal(block.ids, [[6, 7, 8, 9, -1], [0, 1, 2, 3, -1]])
    np.testing.assert_array_equal(block.arrays['id'][:, :4], block.ids[:, :4])
    assert loader.spec['id'].shape == (5,)


def test_mistakes_in_a_source() -> None:
    class NoItems:
        collate = Ragged.collate

        def __len__(self) -> int:
            return 3

    with pytest.raises(TypeError, match='NoItems has collate but no __getitem__'):
        make(source=NoItems())
    with pytest.raises(ValueError, match='padding_rows=-1; expected a whole number, at least 0'):
        make(source=Ragged(padding_rows=-1))
    with pytest.raises(ValueError, match='num_shapes=0'):
        make(source=Ragged(num_shapes=0))
    with pytest.raises(ValueError, match='is empty'):
        make(source=Ragged(0))


def test_a_source_may_arrange_an_epoch() -> None:
    class Backwards(Ragged):
        def arrange(self, order: np.ndarray, seed: int, epoch: int) -> np.ndarray:
            return np.sort(order)[::-1][: self.left]

    source = Backwards()
    source.left = 10
    np.testing.assert_array_equal(
        make(source=source, shuffle=True).block(0, 2).ids, [[9, 8, 7, 6], [5, 4, 3, 2]]
    )
    # The order of the source is kept without a shuffle.
    np.testing.assert_array_equal(make(source=source).block(0, 1).ids, [[0, 1, 2, 3]])
    source.left = 9
    with pytest.raises(ValueError, match='must return all examples of the order'):
        make(source=source, shuffle=True).block(0, 1)


def test_errors_name_the_example() -> None:
    class Bad(Ragged):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 6:
                raise OSError('cannot be read')
            return super().__getitem__(index)

    class TooLarge(Ragged):
        def collate(self, examples: list[Any], rows: int) -> Any:
            raise ValueError('too large')

    with pytest.raises(OSError) as caught:
        make(source=Bad()).block(1, 1)
    assert caught.value.__notes__ == ['while reading example 6 of the source Bad']
    with pytest.raises(ValueError, match='too large') as large:
        make(source=TooLarge()).block(1, 1)
    assert large.value.__notes__ == ['while collating the examples 4, 5, 6, 7']
    with pytest.raises(ValueError, match='NoArrays returned a batch without arrays'):
        make(source=type('NoArrays', (Ragged,), {'collate': lambda *_: {}})()).block(0, 1)
    with pytest.raises(TypeError, match='Wrong returned a batch with a set in it; expected dicts'):
        make(source=type('Wrong', (Ragged,), {'collate': lambda *_: {'x': {1}}})()).block(0, 1)


def test_the_arrays_of_a_batch_may_be_nested() -> None:
    class Pairs(Ragged):
        def collate(self, examples: list[Any], rows: int) -> Any:
            return (np.zeros(3), {'x': np.ones((rows, 2))})

    (zeros, rest), ids = Collator(Pairs(), (), 0, 5).batches(np.array([[0, 1]]), np.zeros((1, 2)))
    assert zeros.shape == (1, 3) and rest['x'].shape == (1, 5, 2)
    np.testing.assert_array_equal(ids, [[0, 1, -1, -1, -1]])
