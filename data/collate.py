# SPDX-License-Identifier: Apache-2.0
"""Sources with a `collate` of their own, such as graphs and sequences of different lengths.

A source with a method `collate` is read one example at a time, and `collate` makes a batch of
them. The loaders of this package use it: `TrainLoader`, `EvalLoader` and `GrainLoader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from . import transforms as transforms_lib
from .foreign import GrainMap
from .nested import leaves_with_names, map_arrays
from .order import PADDING
from .per_example import PerExample
from .record_errors import describe, raise_with_note
from .rng import ExampleRng, wants_rng


class CollatingSource(Protocol):
    """A random-access dataset whose batches are made by a method of its own.

    Optional attributes:
        padding_rows: how many places a batch needs beyond its batch size; 0 by default. A padded
            batch of graphs needs 1: a graph that all nodes and edges of padding belong to.
        num_shapes: how many shapes `collate` returns for one number of places; 1 by default. A
            program is compiled for each of them.
        arrange: a function `arrange(order, seed, epoch)` that returns the shuffled examples of an
            epoch in another order, int64 (examples,), for instance with examples of similar size
            together. It must be a function of its arguments, and must not know the batch size:
            a run may resume with another one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Returns one example: what `collate` takes. For transforms, a tree of arrays."""

    def collate(self, examples: list[Any], rows: int) -> Any:
        """Returns a batch with places for `rows` examples, a tree of numpy arrays.

        It must be a function of its arguments, because a resumed run, and each process of a run,
        collates the same batches again.

        Args:
            examples: at least one and at most `rows`. They take the first places, in this order;
                the others are padding.
            rows: number of places.

        Returns:
            Arrays of any shapes, among `num_shapes` for the whole batch. An array whose first
            dimension is `rows` has one entry for each place; other arrays have another first
            dimension. Values of padding must be finite, and so must what the model computes from
            them: the mask cannot remove a NaN. `_mask` is added by the loader.
        """


def is_collating(source: Any) -> bool:
    """Whether a source makes its batches itself."""
    return callable(getattr(source, 'collate', None))


def check_collating(source: Any) -> None:
    """Checks the protocol of a source that collates, without reading it.

    Raises:
        TypeError: if it has no length or no items.
        ValueError: if `padding_rows` or `num_shapes` is out of range.
    """
    name = type(source).__name__
    for method in ('__len__', '__getitem__'):
        if not hasattr(source, method):
            raise TypeError(
                f'the source {name} has collate but no {method}; a source that collates is read '
                'one example at a time: see trainer.data.collate:CollatingSource'
            )
    for attribute, least in (('padding_rows', 0), ('num_shapes', 1)):
        value = getattr(source, attribute, least)
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f'the source {name} has {attribute}={value!r}; expected a whole number, at least '
                f'{least}'
            )


def padding_rows(source: Any) -> int:
    """Returns how many places a batch of a source needs beyond its batch size."""
    return getattr(source, 'padding_rows', 0) if is_collating(source) else 0


class Collator:
    """Reads, transforms and collates the examples of batches.

    Attributes:
        rows: places for examples in a batch.
        num_shapes: how many shapes the batches may have.
    """

    def __init__(self, source: Any, transforms: Sequence[Callable[..., Any]], seed: int, rows: int):
        """Checks the source and the order of the transforms; reads nothing.

        Args:
            source: see `CollatingSource`.
            transforms: those of single examples (`PerExample`, `Map` and `RandomMap` of Grain) run
                before `collate`, those of batches after it.
            seed: seed of random transforms.
            rows: places for examples in a batch.

        Raises:
            TypeError: as `check_collating`.
            ValueError: as `check_collating`, and if a transform of single examples comes after one
                of batches.
        """
        check_collating(source)
        self.rows = rows
        self.num_shapes: int = getattr(source, 'num_shapes', 1)
        self._source = source
        self._seed = seed
        self._before, self._after = _divide(transforms)

    def batches(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Any, np.ndarray]:
        """Returns the batches of several steps, and the example in each of their places.

        Args:
            ids: int64 (steps, batch_size); padding is at the end of a row.
            epochs: int64 (steps, batch_size).

        Returns:
            The stacked batches, each array (steps, ...), and int64 (steps, rows).

        Raises:
            ValueError: if the batches of several steps differ in shape.
        """
        # Places beyond the batch size are padding in every batch.
        more = ((0, 0), (0, self.rows - ids.shape[1]))
        ids = np.pad(ids, more, constant_values=PADDING)
        epochs = np.pad(epochs, more)
        return stack_batches([self._batch(*each) for each in zip(ids, epochs, strict=True)]), ids

    def first(self) -> Any:
        """Returns the batch of the first example alone, as in epoch 0."""
        places = np.full(self.rows, PADDING)
        places[0] = 0
        return self._batch(places, np.zeros_like(places))

    def _batch(self, ids: np.ndarray, epochs: np.ndarray) -> Any:
        real = ids != PADDING
        pairs = zip(ids[real].tolist(), epochs[real].tolist(), strict=True)
        examples = [self._example(*pair) for pair in pairs]
        try:
            batch = self._source.collate(examples, self.rows)
        except Exception as error:
            # A note, so that the error keeps its type and its traceback.
            error.add_note(f'while collating the examples {_list(ids[real])}')
            raise
        return self._transform(_to_arrays(batch, self._source), ids, epochs)

    def _example(self, index: int, epoch: int) -> Any:
        try:
            example = self._source[index]
            if not self._before:
                return example
            # A batch of one example: examples may differ in shape, so they cannot be stacked.
            batch = transforms_lib.apply(
                self._before,
                map_arrays(lambda x: np.asarray(x)[None], example),
                seed=self._seed,
                epochs=np.array([epoch]),
                ids=np.array([index]),
            )
            return map_arrays(lambda x: x[0], batch)
        except Exception as error:
            raise_with_note(error, f'while reading {describe(self._source, index)}')

    def _transform(self, batch: Any, ids: np.ndarray, epochs: np.ndarray) -> Any:
        """Returns a batch after the transforms of batches; they may change any dimension."""
        for position, transform in enumerate(self._after, start=len(self._before)):
            try:
                if wants_rng(transform):
                    # An entry for each place, padding included.
                    rng = ExampleRng(self._seed, position, epochs, ids)
                    batch = transform(batch, rng)
                else:
                    batch = transform(batch)
            except Exception as error:
                error.add_note(f'in transforms[{position}] = {transform!r}')
                raise
            batch = _to_arrays(batch, transform)
        return batch


def _divide(
    transforms: Sequence[Callable[..., Any]],
) -> tuple[tuple[Callable[..., Any], ...], tuple[Callable[..., Any], ...]]:
    """Returns the transforms of single examples, and those of batches, which follow them."""
    single = [isinstance(each, PerExample | GrainMap) for each in transforms]
    count = single.index(False) if False in single else len(single)
    if True in single[count:]:
        late = single.index(True, count)
        raise ValueError(
            f'transforms[{late}] = {transforms[late]!r:.100} is of single examples, which run '
            f'before the source collates them, but transforms[{count}] = '
            f'{transforms[count]!r:.100} is of batches: move it to the end'
        )
    return tuple(transforms[:count]), tuple(transforms[count:])


def _to_arrays(batch: Any, maker: Any) -> Any:
    """Returns a batch with numpy arrays only."""
    name = type(maker).__name__

    def to_array(x: Any) -> np.ndarray:
        array = np.asarray(x)
        if array.dtype == object and not isinstance(x, np.ndarray):
            raise TypeError(
                f'{name} returned a batch with a {type(x).__name__} in it; expected dicts, lists, '
                'tuples and NamedTuples of numpy arrays'
            )
        return array

    batch = map_arrays(to_array, batch)
    if not leaves_with_names(batch):
        raise ValueError(f'{name} returned a batch without arrays; expected a tree of arrays')
    return batch


def stack_batches(batches: list[Any]) -> Any:
    """Returns the batches of several steps, each array (steps, ...).

    Raises:
        ValueError: if they differ in shape.
    """
    if len(batches) == 1:
        return map_arrays(lambda x: x[None], batches[0])
    shapes = {str({n: x.shape for n, x in leaves_with_names(b).items()}) for b in batches}
    if len(shapes) > 1:
        raise ValueError(
            f'batches of different shapes cannot be stacked: {" and ".join(sorted(shapes))}. '
            'Request one at a time'
        )
    return map_arrays(lambda *arrays: np.stack(arrays), *batches)


def _list(ids: np.ndarray) -> str:
    return ', '.join(map(str, ids[:8].tolist())) + (', ...' if len(ids) > 8 else '')
