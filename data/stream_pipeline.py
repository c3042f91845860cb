# SPDX-License-Identifier: Apache-2.0
"""A stream as a Grain pipeline: what one of several readers iterates over in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .order import epoch_order
from .record_errors import describe
from .workers import portable, prefetched


class Stream(Protocol):
    """What can only be read from the front, by several readers who each take a part.

    The iterator of a part has, beside `__next__` (a dict of arrays), `get_state()`: the place
    behind the last example as a JSON value, and `set_state(state)`, which goes there.
    """

    def shard(self, index: int, count: int) -> Any:
        """Returns the iterable of reader `index` of `count`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A source, and the stages that its examples run through.

    Attributes:
        source: a source of `trainer.data.sources`; anything with a length and items that are dicts
            of arrays, of any shapes; a Grain dataset; or a `Stream`.
        stages: callables from one `grain.IterDataset` to another, see `trainer.data.stages`.
        seed: of the order.
        shuffle: a new order in each pass, where the source is one that can be read in any order.
        threads: that read ahead.
        workers: processes that read and run the stages; 0 leaves it to this one.
    """

    source: Any
    stages: Sequence[Callable[[Any], Any]] = ()
    seed: int = 0
    shuffle: bool = False
    threads: int = 8
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ('threads', 'workers'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}: {getattr(self, name)}; expected at least 0')
        if self.workers and not _is_random_access(self.source):
            raise ValueError(
                f'workers: {self.workers}; {_name(self.source)} is read from the front, by one '
                'process. Leave it to threads with workers=0'
            )

    def part(self, index: int, count: int, epoch: int) -> Any:
        """Returns the `grain.IterDataset` of one pass of reader `index` of `count`.

        Raises:
            TypeError: if the source is none, or a stage returns no dataset.
            ValueError: if the source cannot be read by several.
        """
        import grain.python as grain

        dataset = self._source(index, count, epoch)
        for number, stage in enumerate(self.stages):
            dataset = stage(dataset)
            if not isinstance(dataset, grain.IterDataset):
                raise TypeError(
                    f'stages[{number}] = {stage!r} returned {_name(dataset)}; a stage takes a '
                    'grain.IterDataset and returns one'
                )
        if not self.workers:
            return dataset
        return prefetched(_told(dataset), self.workers, buffer=16)

    def _source(self, index: int, count: int, epoch: int) -> Any:
        import grain.python as grain

        source = self.source
        if isinstance(source, grain.IterDataset):
            if count > 1:
                raise ValueError(
                    f'a grain.IterDataset cannot be divided among {count} processes. Give a '
                    'grain.MapDataset and put what follows into `stages`, or an object with '
                    'shard(index, count)'
                )
            return source
        if hasattr(source, 'shard'):
            return _stateful(source.shard(index, count))
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=4 * self.threads)
        return self._items(index, count, epoch).to_iter_dataset(options)

    def _items(self, index: int, count: int, epoch: int) -> Any:
        import grain.python as grain

        source = self.source
        if isinstance(source, grain.MapDataset):
            # Grain counts on over the end of a pass, and shuffles each in another way.
            first = epoch * len(source)
            return source.repeat(epoch + 1)[first + index :: count]
        if not _is_random_access(source):
            raise TypeError(
                f'the source {_name(source)} can be neither read by index (__len__, and '
                '__getitem__ or gather) nor from the front (shard(index, count))'
            )
        order = np.arange(len(source))
        if self.shuffle:
            order = epoch_order(len(source), self.seed, epoch)
        return grain.MapDataset.source(_Ordered(source, order[index::count]))


def _is_random_access(source: Any) -> bool:
    readable = hasattr(source, '__getitem__') or hasattr(source, 'gather')
    return hasattr(source, '__len__') and readable and not hasattr(source, 'shard')


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """Some examples of a source, in an order."""

    source: Any
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        index = int(self.order[place])
        try:
            if hasattr(self.source, '__getitem__'):
                return {name: np.asarray(x) for name, x in self.source[index].items()}
            return {name: x[0] for name, x in self.source.gather(np.array([index])).items()}
        except Exception as error:
            error.add_note(f'while reading {describe(self.source, index)}')
            raise


def _stateful(part: Any) -> Any:
    """Returns a Grain dataset over an iterable whose iterator keeps its own place."""
    import grain.python as grain

    class Iterator(grain.DatasetIterator):
        def __init__(self, inner: Any):
            super().__init__()
            self._inner = inner

        def __next__(self) -> Any:
            return {name: np.asarray(x) for name, x in next(self._inner).items()}

        def get_state(self) -> Any:
            return self._inner.get_state()

        def set_state(self, state: Any) -> None:
            self._inner.set_state(state)

    class Dataset(grain.IterDataset):
        def __iter__(self) -> Iterator:
            return Iterator(iter(part))

    return Dataset()


def _told(dataset: Any) -> Any:
    """Returns the dataset with errors that survive the way out of a worker process."""
    import grain.python as grain

    class Iterator(grain.DatasetIterator):
        def __init__(self, inner: Any):
            super().__init__(inner)
            self._inner = inner

        def __next__(self) -> Any:
            try:
                return next(self._inner)
            except StopIteration:
                raise
            except Exception as error:
                raise portable(error) from None

        def get_state(self) -> Any:
            return self._inner.get_state()

        def set_state(self, state: Any) -> None:
            self._inner.set_state(state)

    class Dataset(grain.IterDataset):
        def __iter__(self) -> Iterator:
            (parent,) = self.parents
            return Iterator(iter(parent))

    return Dataset(dataset)


def _name(value: Any) -> str:
    return type(value).__name__
