# SPDX-License-Identifier: Apache-2.0
"""The source protocol (length, spec, gather of many examples) and the basic sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from . import nested
from .nested import Tree

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
    def spec(self) -> Tree:
        """`ArraySpec` of each array of one example: a dict, or another tree (`data.nested`)."""

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> Tree:
        """Returns the examples at int64 `indices` (n,): the same tree, each array (n, ...).

        Each call returns new arrays: devices may still read those of earlier calls.
        """


def check_source(source: Source) -> None:
    """Checks the protocol of a source by reading its first and last example.

    An exception in `gather` is ignored here: the first batch raises it with its traceback.

    Raises:
        TypeError: if the source has no length or `gather`, or `gather` does not return a tree of
            arrays.
        ValueError: if `gather` returns a wrong number of rows, or reading `spec` raises it because
            examples differ in shape.
    """
    missing = [name for name in ('__len__', 'gather') if not hasattr(source, name)]
    if missing and hasattr(source, 'collate'):
        raise TypeError(
            f'the source {_name(source)} makes whole batches with its method collate, so only a '
            'loader can read it, and no other source'
        )
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
        TypeError: if it is not a tree of arrays, such as a dict.
        ValueError: if an array has a different number of rows.
    """
    # A list of dicts is a list of examples, not a batch of stacked arrays.
    is_of_examples = isinstance(arrays, list) and isinstance(next(iter(arrays), None), Mapping)
    if not isinstance(arrays, dict | list | tuple) or is_of_examples:
        raise TypeError(
            f'gather of the source {_name(source)} returned {_name(arrays)}; expected a dict of '
            'numpy arrays (rows, ...), or a tuple or another tree of them'
        )

    def check(name: str, x: Any) -> None:
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

    nested.map_named(check, arrays)


def join_vocabularies(sources: Sequence[Any]) -> str | None:
    """Returns the checksum of the vocabulary of sources that are read as one; None without one.

    Raises:
        ValueError: if they have different ones.
    """
    found = [getattr(source, 'vocabulary', None) for source in sources]
    # An attribute of this name may be something else in a source of the user.
    checksums = {number: x for number, x in enumerate(found) if isinstance(x, str)}
    if len(set(checksums.values())) > 1:
        shown = ', '.join(f'source {number} has {x}' for number, x in checksums.items())
        raise ValueError(
            f'sources: their tokens have different vocabularies, by their checksums: {shown}. A '
            'model has one vocabulary: give all sources the same'
        )
    return next(iter(checksums.values()), None)


def _name(value: Any) -> str:
    return type(value).__name__


def _to_native_order(x: np.ndarray) -> np.ndarray:
    """Returns the array in the native byte order, the only one that devices accept."""
    return x.astype(x.dtype.newbyteorder('='), copy=False)


class ArraySource:
    """Examples in memory: a dict of arrays, or another tree of them."""

    def __init__(self, arrays: Tree, *, limit: int | None = None):
        """Keeps the arrays (examples, ...).

        Args:
            arrays: arrays of equal length, in a dict or another tree (`data.nested`).
            limit: use only this many examples from the start.

        Raises:
            ValueError: if the lengths differ, there are no examples, or the limit is not positive.
        """
        if limit is not None and limit < 1:
            raise ValueError(
                f'limit: {limit} examples; expected a positive number, or None for all'
            )
        fields = nested.map_arrays(lambda x: _to_native_order(np.asarray(x)), arrays)
        leaves = nested.leaves_with_names(fields)
        lengths = {name: len(x) if x.ndim else None for name, x in leaves.items()}
        if len(set(lengths.values())) != 1 or {0, None} & set(lengths.values()):
            raise ValueError(
                'all fields of a source must have the same positive length (number of examples); '
                f'got {lengths}'
            )
        # A view: no memory is copied for a limit.
        self._arrays = nested.map_arrays(lambda x: x[:limit], fields)

    @property
    def spec(self) -> Tree:
        """Shape and dtype of each array of one example."""
        return nested.map_arrays(lambda x: ArraySpec(x.shape[1:], x.dtype), self._arrays)

    def __len__(self) -> int:
        return len(nested.first_array(self._arrays))

    def gather(self, indices: np.ndarray) -> Tree:
        """Returns the examples at `indices` (n,), each array as (n, ...)."""
        # Copies, as the protocol asks.
        return nested.map_arrays(lambda x: np.take(x, indices, axis=0), self._arrays)


class RandomAccessSource:
    """Wraps an object with a length and items that are dicts, or other trees, of arrays.

    The arrays of all items have the same shapes. If the object has `__getitems__` (like the data
    sources of TFDS and PyTorch datasets), many items are read with one call, which is much faster.
    """

    def __init__(self, items: Any):
        """Keeps the object; reads its first item for the spec.

        Raises:
            TypeError: if its items are not trees of arrays, such as dicts.
            ValueError: if it is empty.
        """
        if not len(items):
            raise ValueError('the source is empty')
        self._items = items
        first = items[0]
        if not isinstance(first, Mapping | list | tuple):
            raise TypeError(
                f'the items of {_name(items)} are of type {_name(first)}; expected dicts of arrays '
                '(or tuples or other trees of them): a source of single arrays can return '
                "{'image': array}"
            )
        # Items may have Python numbers, which get numpy's default dtype.
        arrays = nested.map_arrays(np.asarray, first)
        self.spec = nested.map_arrays(lambda x: ArraySpec(x.shape, x.dtype), arrays)
        self._is_flat = nested.is_flat(self.spec)

    def __len__(self) -> int:
        return len(self._items)

    def gather(self, indices: np.ndarray) -> Tree:
        """Returns the examples at `indices` (n,), stacked.

        Raises:
            ValueError: if an example differs from the first one in structure, shape or dtype.
        """
        wanted = indices.tolist()
        read_many = getattr(self._items, '__getitems__', None)
        items = read_many(wanted) if read_many else [self._items[i] for i in wanted]
        if self._is_flat:  # Items may have more fields than the first one.
            return {
                name: _stack(name, first, [item[name] for item in items], wanted)
                for name, first in self.spec.items()
            }
        try:
            return nested.map_named(
                lambda name, first, *values: _stack(name, first, values, wanted), self.spec, *items
            )
        except nested.StructureError as error:
            raise ValueError(
                f'example {wanted[error.position]} has another structure than example 0: '
                f'{error.difference}'
            ) from None


def _stack(
    name: str, first: ArraySpec, values: Sequence[Any], indices: Sequence[int]
) -> np.ndarray:
    """Returns the values of an array of several examples, stacked."""
    arrays = [np.asarray(value) for value in values]
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
