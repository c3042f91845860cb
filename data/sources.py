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
            ValueError: if the lengths differ, or there is nothing.
        """
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
    """Any object with a length and items that are dicts of arrays, read one by one."""

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
        """Returns the examples at `indices` (n,), stacked."""
        items = [self._items[int(i)] for i in indices]
        return {name: np.stack([item[name] for item in items]) for name in self.spec}
