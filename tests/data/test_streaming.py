# SPDX-License-Identifier: Apache-2.0
"""Streams: position, passes, several readers, and evaluations of unknown length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain
import numpy as np
import pytest

from tests.marks import slow_after, slow_except
from trainer.data.loader import Block
from trainer.data.sources import ArraySource
from trainer.data.stages import Filter, LongerThan, Map, Pack, Split
from trainer.data.stream_reader import reader_part
from trainer.data.streaming import StreamEvalLoader, StreamLoader
from trainer.data.transforms import PerExample


class Documents:
    """Sequences of 1 to 40 tokens, each token the number of its document."""

    def __init__(self, count: int = 50):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {'tokens': np.full(1 + index * 7 % 40, index + 1, np.int32)}


class Counter:
    """A stream with a position of its own: the numbers 0 to n - 1, divided among the readers."""

    def __init__(self, n: int):
        self.n = n

    def shard(self, index: int, count: int) -> Any:
        outer = self

        class Numbers:
            def __iter__(self) -> Any:
                return Position()

        class Position:
            at = index

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> dict[str, Any]:
                if self.at >= outer.n:
                    raise StopIteration
                self.at += count
                return {'x': np.int32(self.at - count)}

            def get_state(self) -> int:
                return self.at

            def set_state(self, state: int) -> None:
                self.at = state

            def close(self) -> None: ...

        return Numbers()


def is_not_third(example: dict[str, Any]) -> bool:
    return bool(example['x'] % 3)


def packed_loader(workers: int = 0, **options: Any) -> StreamLoader:
    stages = (Filter(keep=LongerThan(length=3)), Pack(length=16, open_rows=4))
    return StreamLoader(
        source=Documents(), batch_size=4, stages=stages, seed=1, workers=workers, **options
    )


LOADERS: dict[str, Callable[[], StreamLoader]] = {
    'packed': packed_loader,
    'workers': lambda: packed_loader(workers=2),
    'own position': lambda: StreamLoader(
        source=Counter(30), batch_size=4, stages=(Filter(keep=is_not_third),)
    ),
    'grain': lambda: StreamLoader(
        source=grain.MapDataset.range(30).shuffle(seed=3).map(lambda i: {'x': np.int32(i)}),
        batch_size=4,
    ),
}


def equal(a: Block, b: Block) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    for name, x in a.arrays.items():
        np.testing.assert_array_equal(x, b.arrays[name])
    assert a.states == b.states


@pytest.fixture
def open_loaders() -> Iterator[list[Any]]:
    loaders: list[Any] = []
    yield loaders
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize('kind', slow_except(LOADERS.keys() - {'workers'}, LOADERS))
def test_a_restored_stream_continues_exactly(kind: str, open_loaders: list[Any]) -> None:
    """Across the ends of several passes, with a position that was written to JSON."""
    whole = LOADERS[kind]()
    open_loaders.append(whole)
    blocks = [whole.block(step, 1) for step in range(30)]
    for step in (1, 2, 7, 15, 29) if kind != 'workers' else (9,):
        again = LOADERS[kind]()
        open_loaders.append(again)
        assert blocks[step - 1].states is not None
        again.restore(step, json.loads(json.dumps(blocks[step - 1].states[0])))
        equal(again.block(step, 1), blocks[step])


def add_noise(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**example, 'noise': rng.integers(0, 2**31)}


def test_batches_after_a_change_of_the_batch_size(open_loaders: list[Any]) -> None:
    """Three batches of 4, then batches of 6: random transforms draw the same numbers."""

    def loader(batch_size: int) -> StreamLoader:
        open_loaders.append(
            StreamLoader(
                source=Counter(50), batch_size=batch_size, transforms=(PerExample(fn=add_noise),)
            )
        )
        return open_loaders[-1]

    whole, first, then = loader(1).block(0, 48), loader(4), loader(6)
    states = first.block(0, 3).states
    assert states is not None
    after = then.after(((0, 4), (3, 6)))
    open_loaders.append(after)
    after.restore(3, states[-1])
    found = after.block(3, 6)
    for name, x in found.arrays.items():
        np.testing.assert_array_equal(x.ravel(), whole.arrays[name].ravel()[12:])
    assert after.marks == ((0, 0), (3, 2))
    assert then.marks == then.after(((0, 6),)).marks == ()


def test_batches_do_not_depend_on_the_blocks(open_loaders: list[Any]) -> None:
    one, many = packed_loader(), packed_loader()
    open_loaders += [one, many]
    together = many.block(0, 12)
    for step in range(12):
        single = one.block(step, 1)
        np.testing.assert_array_equal(single.arrays['tokens'][0], together.arrays['tokens'][step])
        assert single.states == together.states[step : step + 1]  # type: ignore[index]


def test_packed_rows_contain_every_long_document_once(open_loaders: list[Any]) -> None:
    """One pass: all tokens, whole segments, and positions within each."""
    stages = (Filter(keep=LongerThan(length=3)), Pack(length=16, open_rows=4))
    loader = StreamEvalLoader(source=Documents(), batch_size=5, stages=stages)
    open_loaders.append(loader)
    rows = [b.arrays for b in (loader.block(i, 1) for i in range(40))]
    found: dict[int, int] = {}
    for batch in rows:
        for row in np.flatnonzero(batch['_mask'][0]):
            tokens, ids = batch['tokens'][0, row], batch['tokens_segment_ids'][0, row]
            assert (tokens[ids == 0] == 0).all()
            for segment in range(1, ids.max() + 1):
                members = tokens[ids == segment]
                assert len(set(members.tolist())) == 1
                positions = batch['tokens_positions'][0, row][ids == segment]
                np.testing.assert_array_equal(positions, np.arange(len(members)))
                found[int(members[0])] = found.get(int(members[0]), 0) + len(members)
    lengths = {i + 1: len(Documents()[i]['tokens']) for i in range(50)}
    assert found == {number: n for number, n in lengths.items() if n > 3}
    assert not rows[-1]['_mask'].any()


def test_each_pass_has_its_own_order(open_loaders: list[Any]) -> None:
    source = ArraySource({'x': np.arange(12, dtype=np.int32)})
    loader = StreamLoader(source=source, batch_size=4, seed=2)
    open_loaders.append(loader)
    passes = loader.block(0, 9).arrays['x'].reshape(3, 12)
    assert all(sorted(one) == list(range(12)) for one in passes.tolist())
    assert not (passes[0] == passes[1]).all() and not (passes[1] == passes[2]).all()


@pytest.mark.parametrize('kind', ['packed', 'own position', 'grain'])
def test_two_readers_share_a_pass(kind: str, open_loaders: list[Any]) -> None:
    """Each reads its own part; together they read what one reader does, in another order."""
    parts = []
    for rows in (np.array([0, 1]), np.array([2, 3])):
        loader = LOADERS[kind]()
        open_loaders.append(loader)
        name = 'tokens' if kind == 'packed' else 'x'
        parts.append(loader.block(0, 3, rows).arrays[name])
        state = loader.block(3, 1, rows).states
        assert state is not None and state[0]['part'] == [rows[0] // 2, 2]
    assert parts[0].shape[:2] == (3, 2)
    first, second = ({x.tobytes() for x in part.reshape(6, -1)} for part in parts)
    assert not first & second


def test_rows_that_are_not_an_equal_part_are_refused() -> None:
    assert reader_part(np.arange(8), 8) == (0, 1)
    assert reader_part(np.array([4, 5]), 8) == (2, 4)
    for rows in ([0, 2], [1, 2], [0, 1, 2], []):
        with pytest.raises(ValueError, match='equal parts of consecutive rows'):
            reader_part(np.array(rows, np.int64), 8)


def test_a_jump_is_refused(open_loaders: list[Any]) -> None:
    loader = packed_loader()
    open_loaders.append(loader)
    loader.block(0, 2)
    with pytest.raises(RuntimeError, match='expected a request for batch 2, got 5'):
        loader.block(5, 1)
    first = loader.block(0, 1)
    equal(first, packed_loader().block(0, 1))


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        (
            lambda: StreamLoader(source=Counter(9), batch_size=2, stages=(Filter(keep=is_none),)),
            'a whole pass over the stream has no example: ',
        ),
        (
            lambda: StreamLoader(source=Documents(), batch_size=4),
            r'need the same shapes; the stream has tokens: int32\[\d+\], then tokens: int32',
        ),
        (
            lambda: StreamLoader(source=grain.MapDataset.range(9).to_iter_dataset(), batch_size=2),
            'cannot be divided among 2 processes',
        ),
    ],
)
def test_mistakes_are_named(loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader().block(0, 1, slice(0, 1) if 'divided' in message else slice(None))


def is_none(example: Any) -> bool:
    return False


def test_an_invalid_source_or_stage_is_named() -> None:
    with pytest.raises(TypeError, match='the source int can be read neither by index'):
        StreamLoader(source=3, batch_size=2).block(0, 1)
    with pytest.raises(TypeError, match=r'stages\[0\] = .* returned NoneType'):
        StreamLoader(source=Counter(9), batch_size=2, stages=(lambda ds: None,)).block(0, 1)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'remainder': 'pad'}, "use 'carry'"),
        ({'repeat_batch': 0}, 'repeat_batch: 0'),
        ({'batch_size': 0}, 'batch_size: 0'),
        ({'threads': -1}, 'threads: -1'),
        ({'workers': 2}, 'workers: 2; Counter has no random access'),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamLoader(**{'source': Counter(9), 'batch_size': 2, **options})
    for stage in (Pack, Split):
        with pytest.raises(ValueError, match='length: 0'):
            stage(length=0)


def test_the_position_of_another_pipeline_is_refused() -> None:
    state = packed_loader().block(0, 1).states
    assert state is not None
    other = StreamLoader(source=Documents(), batch_size=4, stages=(Pack(length=16),))
    with pytest.raises(ValueError, match='does not fit this pipeline'):
        other.restore(1, {**state[0], 'place': {'another': 1}})
    with pytest.raises(ValueError, match='is for 3 workers, and this run has 0'):
        other.restore(1, {**state[0], 'workers': 3})


@pytest.mark.parametrize('workers', slow_after(1, [0, 1]))
def test_an_unreadable_record_is_named(workers: int, open_loaders: list[Any]) -> None:
    class Broken(Documents):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            if index == 17:
                raise KeyError('damaged')
            return super().__getitem__(index)

        def describe(self, index: int) -> str:
            return f'document {index} of the shelf'

    stages = (Pack(length=16),)
    loader = StreamLoader(source=Broken(), batch_size=4, stages=stages, workers=workers)
    open_loaders.append(loader)
    with pytest.raises((KeyError, RuntimeError)) as caught:
        loader.block(0, 100)
    told = str(caught.value) + ''.join(getattr(caught.value, '__notes__', ()))
    assert 'damaged' in told and 'document 17 of the shelf' in told


def test_a_repeated_batch(open_loaders: list[Any]) -> None:
    loader, whole = packed_loader(repeat_batch=2), packed_loader()
    open_loaders += [loader, whole]
    first = whole.block(0, 2)
    block = loader.block(5, 3)
    np.testing.assert_array_equal(block.arrays['tokens'], first.arrays['tokens'][[1, 0, 1]])
    np.testing.assert_array_equal(block.ids, first.ids[[1, 0, 1]])


def test_random_transforms_depend_on_the_position(open_loaders: list[Any]) -> None:
    def noise(batch: Any, rng: Any) -> Any:
        return {**batch, 'noise': rng.uniform()}

    def loader() -> StreamLoader:
        open_loaders.append(StreamLoader(source=Counter(9), batch_size=4, transforms=(noise,)))
        return open_loaders[-1]

    whole = loader().block(0, 3).arrays['noise']
    assert len(np.unique(whole)) == 12
    halves = [loader().block(0, 3, np.array(rows)).arrays['noise'] for rows in ([0, 1], [2, 3])]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)


@pytest.mark.parametrize('readers', [1, 2, 3])
@pytest.mark.parametrize('left', [0, 1, 13])
def test_a_stream_evaluation_reads_every_example_once(
    readers: int, left: int, open_loaders: list[Any]
) -> None:
    """The number of filtered examples is unknown; a reader may get none."""
    stages = (Filter(keep=lambda x: bool(x['x'] < left)),)
    seen: list[int] = []
    for reader in range(readers):
        source = ArraySource({'x': np.arange(40, dtype=np.int32)})
        loader = StreamEvalLoader(source=source, batch_size=6, stages=stages)
        open_loaders.append(loader)
        rows = np.arange(reader * 6 // readers, (reader + 1) * 6 // readers)
        for step in range(12):
            if not left:
                with pytest.raises(ValueError, match='a whole pass over the stream has no example'):
                    loader.block(step, 1, rows)
                break
            block = loader.block(step, 1, rows)
            assert block.arrays['x'].shape == (1, len(rows))
            np.testing.assert_array_equal(block.ids >= 0, block.arrays['_mask'])
            seen += block.arrays['x'][block.arrays['_mask']].tolist()
        else:
            assert not block.arrays['_mask'].any()
    assert sorted(seen) == list(range(left))


def test_map_changes_examples(open_loaders: list[Any]) -> None:
    stages = (Map(fn=lambda x: {'x': x['x'] * 10}),)
    loader = StreamEvalLoader(source=Counter(4), batch_size=2, stages=stages)
    open_loaders.append(loader)
    assert loader.block(0, 2).arrays['x'].tolist() == [[0, 10], [20, 30]]
    assert loader.spec['x'].shape == (2,)
