# SPDX-License-Identifier: Apache-2.0
"""Sources: a length, a spec, and a gather of many examples at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array.

    Attributes:
        shape: without the batch dimension for a source, with it for a loader.
        dtype: numpy dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """What a loader reads from."""

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape and dtype of each field of one example."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at int64 `indices` (n,), each field as (n, ...).

        In arrays of their own, that no later call changes: the devices may still read them.
        """


def check_source(source: Source) -> None:
    """Reads the first and the last example, to see that a source is one.

    An exception in its `gather` is left to the first batch, where it keeps its traceback.

    Raises:
        TypeError: if it has no length or `gather`, or that returns no dict of arrays.
        ValueError: if `gather` returns another number of rows, or the source knows that its
            examples differ in shape and raises this where its `spec` is read.
    """
    missing = [name for name in ('__len__', 'gather') if not hasattr(source, name)]
    if missing:
        raise TypeError(
            f'the source {_name(source)} has no {missing[0]}; a source has __len__, spec and '
            'gather(indices). Wrap an object with __len__ and __getitem__ in '
            'trainer.data.sources:RandomAccessSource'
        )
    if not len(source):
        return
    getattr(source, 'spec', None)
    indices = np.array([len(source) - 1, 0, 0])
    try:
        arrays = source.gather(indices)
    except Exception:
        return
    check_rows(source, arrays, len(indices))


def check_rows(source: Source, arrays: Any, rows: int) -> None:
    """Checks what `source.gather` returned for so many indices.

    Raises:
        TypeError: if it is no dict of arrays.
        ValueError: if a field has another number of rows.
    """
    if not isinstance(arrays, dict):
        raise TypeError(
            f'gather of the source {_name(source)} returned {_name(arrays)}; expected a dict of '
            'numpy arrays (rows, ...)'
        )
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise TypeError(
                f'gather of the source {_name(source)} returned {_name(x)} as {name!r}; expected a '
                'numpy array (rows, ...)'
            )
        if x.shape[:1] != (rows,):
            raise ValueError(
                f'gather of the source {_name(source)} returned {name!r} in the shape {x.shape} '
                f'for {rows} indices; expected one row for each index, in their order'
            )


def _name(value: Any) -> str:
    return type(value).__name__


def _native(x: np.ndarray) -> np.ndarray:
    """Returns the array in this machine's byte order, the only one that devices take."""
    return x.astype(x.dtype.newbyteorder('='), copy=False)


class ArraySource:
    """Examples held in memory, one array for each field."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, limit: int | None = None):
        """Holds the arrays (examples, ...).

        Args:
            arrays: fields of equal length.
            limit: use only this many examples from the start.

        Raises:
            ValueError: if the lengths differ, there is nothing, or the limit is not positive.
        """
        if limit is not None and limit < 1:
            raise ValueError(
                f'limit: {limit} examples; expected a positive number, or None for all'
            )
        held = {name: _native(np.asarray(x)) for name, x in arrays.items()}
        lengths = {name: len(x) if x.ndim else None for name, x in held.items()}
        if len(set(lengths.values())) != 1 or {0, None} & set(lengths.values()):
            raise ValueError(
                'the fields of a source must have one positive length, the number of examples; got '
                f'{lengths}'
            )
        self._arrays = {name: x[:limit] for name, x in held.items()}

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {name: ArraySpec(x.shape[1:], x.dtype) for name, x in self._arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), each field as (n, ...)."""
        return {name: np.take(x, indices, axis=0) for name, x in self._arrays.items()}


class RandomAccessSource:
    """Any object with a length and items that are dicts of arrays of the same shapes.

    Where the object has `__getitems__` (as the data sources of TFDS, and PyTorch's datasets), it is
    asked for many items at once; its readers are then far quicker.
    """

    def __init__(self, items: Any):
        """Holds the object; reads its first item to learn the spec.

        Raises:
            ValueError: if it is empty.
        """
        if not len(items):
            raise ValueError('the source is empty')
        self._items = items
        first = {name: np.asarray(x) for name, x in items[0].items()}
        self.spec = {name: ArraySpec(x.shape, x.dtype) for name, x in first.items()}

    def __len__(self) -> int:
        return len(self._items)

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), stacked.

        Raises:
            ValueError: if an example has another shape or number type than the first one.
        """
        wanted = indices.tolist()
        read_many = getattr(self._items, '__getitems__', None)
        items = read_many(wanted) if read_many else [self._items[i] for i in wanted]
        return {name: self._stack(name, items, wanted) for name in self.spec}

    def _stack(self, name: str, items: list[Mapping[str, Any]], indices: list[int]) -> np.ndarray:
        first = self.spec[name]
        arrays = [np.asarray(item[name]) for item in items]
        for index, x in zip(indices, arrays, strict=True):
            text = first.dtype.kind in 'SU' and x.dtype.kind == first.dtype.kind  # of any length
            if x.shape != first.shape or not (text or x.dtype == first.dtype):
                raise ValueError(
                    f'{name!r} of example {index} is {x.dtype} {x.shape}, of example 0 it is '
                    f'{first.dtype} {first.shape}; a batch needs one shape and type: resize, crop '
                    'or pad in the items themselves, or leave the field out'
                )
        return np.stack(arrays)
