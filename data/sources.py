# SPDX-License-Identifier: Apache-2.0
"""The source protocol (length, spec, gather of many examples) and the basic sources."""

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
    """A random-access dataset, as a loader reads it."""

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape and dtype of each field of one example."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at int64 `indices` (n,), each field as (n, ...).

        Each call returns new arrays: devices may still read those of earlier calls.
        """


def check_source(source: Source) -> None:
    """Checks the protocol of a source by reading its first and last example.

    An exception in `gather` is ignored here: the first batch raises it with its traceback.

    Raises:
        TypeError: if the source has no length or `gather`, or `gather` does not return a dict of
            arrays.
        ValueError: if `gather` returns a wrong number of rows, or reading `spec` raises it because
            examples differ in shape.
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
    getattr(source, 'spec', None)  # May raise ValueError, see above.
    # Descending and with a repetition: a source that sorts or removes duplicates returns a wrong
    # number of rows.
    indices = np.array([len(source) - 1, 0, 0])
    try:
        arrays = source.gather(indices)
    except Exception:
        return
    check_rows(source, arrays, len(indices))


def check_rows(source: Source, arrays: Any, rows: int) -> None:
    """Checks the result of `source.gather` for `rows` indices.

    Raises:
        TypeError: if it is not a dict of arrays.
        ValueError: if a field has a different number of rows.
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
                f'gather of the source {_name(source)} returned {name!r} of shape {x.shape} '
                f'for {rows} indices; expected one row per index, in the same order'
            )


def _name(value: Any) -> str:
    return type(value).__name__


def _to_native_order(x: np.ndarray) -> np.ndarray:
    """Returns the array in the native byte order, the only one that devices accept."""
    return x.astype(x.dtype.newbyteorder('='), copy=False)


class ArraySource:
    """Examples in memory, one array per field."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, limit: int | None = None):
        """Keeps the arrays (examples, ...).

        Args:
            arrays: fields of equal length.
            limit: use only this many examples from the start.

        Raises:
            ValueError: if the lengths differ, there are no examples, or the limit is not positive.
        """
        if limit is not None and limit < 1:
            raise ValueError(
                f'limit: {limit} examples; expected a positive number, or None for all'
            )
        fields = {name: _to_native_order(np.asarray(x)) for name, x in arrays.items()}
        lengths = {name: len(x) if x.ndim else None for name, x in fields.items()}
        if len(set(lengths.values())) != 1 or {0, None} & set(lengths.values()):
            raise ValueError(
                'all fields of a source must have the same positive length (number of examples); '
                f'got {lengths}'
            )
        # A view: no memory is copied for a limit.
        self._arrays = {name: x[:limit] for name, x in fields.items()}

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {name: ArraySpec(x.shape[1:], x.dtype) for name, x in self._arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), each field as (n, ...)."""
        # Copies, as the protocol asks.
        return {name: np.take(x, indices, axis=0) for name, x in self._arrays.items()}


class RandomAccessSource:
    """Wraps an object with a length and items that are dicts of arrays of equal shapes.

    If the object has `__getitems__` (like the data sources of TFDS and PyTorch datasets), many
    items are read with one call, which is much faster.
    """

    def __init__(self, items: Any):
        """Keeps the object; reads its first item for the spec.

        Raises:
            ValueError: if it is empty.
        """
        if not len(items):
            raise ValueError('the source is empty')
        self._items = items
        # Items may have Python numbers, which get numpy's default dtype.
        first = {name: np.asarray(x) for name, x in items[0].items()}
        self.spec = {name: ArraySpec(x.shape, x.dtype) for name, x in first.items()}

    def __len__(self) -> int:
        return len(self._items)

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), stacked.

        Raises:
            ValueError: if an example differs from the first one in shape or dtype.
        """
        wanted = indices.tolist()
        read_many = getattr(self._items, '__getitems__', None)
        items = read_many(wanted) if read_many else [self._items[i] for i in wanted]
        return {name: self._stack(name, items, wanted) for name in self.spec}

    def _stack(self, name: str, items: list[Mapping[str, Any]], indices: list[int]) -> np.ndarray:
        first = self.spec[name]
        arrays = [np.asarray(item[name]) for item in items]
        for index, x in zip(indices, arrays, strict=True):
            # The dtype of text includes its length, which may differ.
            is_text = first.dtype.kind in 'SU' and x.dtype.kind == first.dtype.kind
            if x.shape != first.shape or not (is_text or x.dtype == first.dtype):
                raise ValueError(
                    f'{name!r} of example {index} is {x.dtype} {x.shape}, but in example 0 it is '
                    f'{first.dtype} {first.shape}; a batch needs one shape and dtype: resize, crop '
                    'or pad in the items themselves, or leave the field out'
                )
        return np.stack(arrays)
