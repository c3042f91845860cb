# SPDX-License-Identifier: Apache-2.0
"""A stream as a Grain pipeline: the dataset of one reader for one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from . import nested
from .collate import is_collating
from .foreign import as_stage
from .nested import Tree
from .order import epoch_order
from .record_errors import describe, raise_with_note
from .workers import prefetch_in_workers, to_portable


class Stream(Protocol):
    """Data that can only be read from the front, by several readers that each take a part.

    Besides `__next__`, which returns an example (a dict, or another tree, of arrays), the iterator
    of a part has `get_state()`, which returns the position after the last example as a JSON value,
    and `set_state(state)`, which moves there.
    """

    def shard(self, index: int, count: int) -> Any:
        """Returns an iterable over the examples of reader `index` of `count`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A source and the stages that are applied to it.

    Attributes:
        source: a source as in `trainer.data.sources`; any object with a length and items that are
            dicts, or other trees, of arrays, of any shapes; a Grain dataset; or a `Stream`.
        stages: callables from one `grain.IterDataset` to another, see `trainer.data.stages`, and
            transform objects of Grain.
        seed: seed of the order and of random stages.
        shuffle: whether to shuffle in each pass, if the source has random access.
        threads: number of threads that read ahead.
        workers: number of processes that read and run the stages; 0 for none.
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
        if is_collating(self.source):
            raise ValueError(
                f'a stream does not call the collate of {_name(self.source)}: use TrainLoader or '
                'GrainLoader, or pack or pad the examples in `stages`'
            )
        if self.workers and not _is_random_access(self.source):
            raise ValueError(
                f'workers: {self.workers}; {_name(self.source)} has no random access, so only one '
                'process can read it. Set workers=0'
            )

    def part(self, index: int, count: int, epoch: int) -> Any:
        """Returns the `grain.IterDataset` of one pass of reader `index` of `count`.

        Raises:
            TypeError: if the source cannot be read, or a stage does not return a dataset.
            ValueError: if the source cannot be divided among readers.
        """
        import grain.python as grain

        dataset = self._source(index, count, epoch)
        for number, stage in enumerate(self.stages):
            dataset = as_stage(
                stage, seed=self.seed, number=number, part=(index, count), epoch=epoch
            )(dataset)
            if not isinstance(dataset, grain.IterDataset):
                raise TypeError(
                    f'stages[{number}] = {stage!r} returned {_name(dataset)}; a stage takes a '
                    'grain.IterDataset and returns one'
                )
        if not self.workers:
            return dataset
        # Last, so that the stages run in the workers too.
        return prefetch_in_workers(_with_portable_errors(dataset), self.workers, buffer=16)

    def _source(self, index: int, count: int, epoch: int) -> Any:
        import grain.python as grain

        source = self.source
        # It has neither a length nor an index, so several readers cannot share it.
        if isinstance(source, grain.IterDataset):
            if count > 1:
                raise ValueError(
                    f'a grain.IterDataset cannot be divided among {count} processes. Use a '
                    'grain.MapDataset and move the other operations to `stages`, or an object '
                    'with shard(index, count)'
                )
            return source
        # Before the length is looked at: a `Stream` may have one, but is read from the front only.
        if hasattr(source, 'shard'):
            return _as_grain_dataset(source.shard(index, count))
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=4 * self.threads)
        return self._items(index, count, epoch).to_iter_dataset(options)

    def _items(self, index: int, count: int, epoch: int) -> Any:
        import grain.python as grain

        source = self.source
        if isinstance(source, grain.MapDataset):
            # In a repeated Grain dataset the indices continue after the end of a pass, and each
            # pass is shuffled differently.
            first = epoch * len(source)
            return source.repeat(epoch + 1)[first + index :: count]
        if not _is_random_access(source):
            raise TypeError(
                f'the source {_name(source)} can be read neither by index (__len__, and '
                '__getitem__ or gather) nor as a stream (shard(index, count))'
            )
        # Every reader computes the whole order and takes each `count`-th example of it, so together
        # they read each example once.
        order = np.arange(len(source))
        if self.shuffle:
            order = epoch_order(len(source), self.seed, epoch)
        return grain.MapDataset.source(_Ordered(source, order[index::count]))


def _is_random_access(source: Any) -> bool:
    readable = hasattr(source, '__getitem__') or hasattr(source, 'gather')
    return hasattr(source, '__len__') and readable and not hasattr(source, 'shard')


@dataclasses.dataclass(frozen=True)
class _Ordered:
    """A selection of the examples of a source, in a given order."""

    source: Any
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Tree:
        index = int(self.order[position])
        try:
            # Preferred to `gather`, which requires that all examples have one shape.
            if hasattr(self.source, '__getitem__'):
                return nested.map_arrays(np.asarray, self.source[index])
            return nested.take_row(self.source.gather(np.array([index])), 0)
        except Exception as error:
            raise_with_note(error, f'while reading {describe(self.source, index)}')


def _as_grain_dataset(part: Any) -> Any:
    """Returns a Grain dataset over an iterable whose iterator saves and restores its position."""

    def read(examples: Any) -> Tree:
        return nested.map_arrays(np.asarray, next(examples))

    return _wrap(part, read, is_grain=False)


def _with_portable_errors(dataset: Any) -> Any:
    """Returns the dataset with exceptions that can be pickled by a worker process."""

    def read(examples: Any) -> Any:
        try:
            return next(examples)
        except StopIteration:
            raise
        except Exception as error:
            raise to_portable(error) from None

    return _wrap(dataset, read, is_grain=True)


def _wrap(inner: Any, read: Callable[[Any], Any], *, is_grain: bool) -> Any:
    """Returns a Grain dataset that reads each example by `read(iterator of inner)`.

    Args:
        inner: an iterable whose iterator has `get_state` and `set_state`.
        read: returns the next example of the iterator; raises StopIteration at the end.
        is_grain: whether `inner` is a `grain.IterDataset`. Grain has to know the parent of a
            dataset, and of its iterator, to pass options on and to close the iterator.
    """
    import grain.python as grain

    # Classes in a function, because their base classes need the import.
    class Iterator(grain.DatasetIterator):
        def __init__(self, examples: Any):
            super().__init__((examples,) if is_grain else ())
            self._examples = examples

        def __next__(self) -> Any:
            return read(self._examples)

        def get_state(self) -> Any:
            return self._examples.get_state()

        def set_state(self, state: Any) -> None:
            self._examples.set_state(state)

    class Dataset(grain.IterDataset):
        def __iter__(self) -> Iterator:
            return Iterator(iter(self.parents[0] if is_grain else inner))

    return Dataset((inner,) if is_grain else ())


def _name(value: Any) -> str:
    return type(value).__name__
