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
        """Returns the examples at int64 `indices` (n,), each field as (n, ...)."""


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
        self._arrays = {name: np.asarray(x)[:limit] for name, x in arrays.items()}
        lengths = {name: len(x) for name, x in self._arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f'the fields of a source must have one positive length; got {lengths}')

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
