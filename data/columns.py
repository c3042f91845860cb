# SPDX-License-Identifier: Apache-2.0
"""Converts the columns of Arrow tables to numpy arrays.

The numpy format of `datasets` picks a dtype from the values of each call, so one row and many rows
of the same column may get different dtypes. Here only the column type decides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .compat import is_decoded

if TYPE_CHECKING:
    import pyarrow as pa

# Maximum number of lists in a column whose lengths are compared up front: 40 MB of offsets.
_MOST_LISTS = 10_000_000
# Kinds of values by the name of their predicate in `pyarrow.types` (without `is_`).
_KINDS = {
    'boolean': 'number',
    'integer': 'number',
    'floating': 'number',
    'decimal': 'decimal',
    'string': 'text',
    'large_string': 'text',
    'string_view': 'text',
    'binary': 'bytes',
    'large_binary': 'bytes',
    'binary_view': 'bytes',
    'fixed_size_binary': 'bytes',
    'timestamp': 'number',
    'date': 'number',
    'duration': 'number',
    'time': 'time',
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A field of the examples: a column, or one leaf field of a struct column.

    Attributes:
        name: name of the field: that of the column and of the struct fields in it, joined by dots.
        top: name of the column.
        path: indices of the struct fields that lead to the values.
        kind: kind of the values: one of `_KINDS`, or 'image'.
        feature: the `datasets` feature that decodes an image.
        problem: why the values cannot be read, or None.
    """

    name: str
    top: str
    path: tuple[int, ...]
    kind: str
    feature: Any = None
    problem: str | None = None


def from_schema(schema: pa.Schema, features: Mapping[str, Any] | None) -> list[Column]:
    """Returns the columns of a table, including those that cannot be read.

    Args:
        schema: schema of the table.
        features: the `datasets` features by column; None if the Arrow types are sufficient.
    """
    features = features or {}
    return [
        column
        for field in schema
        for column in _columns(field.type, features.get(field.name), field.name, field.name, ())
    ]


def _columns(
    type_: pa.DataType, feature: Any, name: str, top: str, path: tuple[int, ...]
) -> Iterator[Column]:
    import pyarrow as pa

    # Before the Arrow type: an image is stored as a struct of bytes and a path, and must not be
    # read as one.
    if is_decoded(feature):
        is_image = type(feature).__name__ == 'Image'
        problem = None if is_image else f'{type(feature).__name__} cannot be converted to arrays'
        yield Column(name, top, path, 'image', feature, problem)
    elif isinstance(type_, pa.BaseExtensionType):
        # Extension and dictionary types are encodings; the values are those of the type inside.
        yield from _columns(type_.storage_type, None, name, top, path)
    elif pa.types.is_dictionary(type_):
        yield from _columns(type_.value_type, None, name, top, path)
    elif pa.types.is_struct(type_):
        inner = feature if isinstance(feature, dict) else {}
        for number, field in enumerate(type_):
            nested = f'{name}.{field.name}', top, (*path, number)
            yield from _columns(field.type, inner.get(field.name), *nested)
    elif _is_list(type_):
        yield from _columns(type_.value_type, getattr(feature, 'feature', None), name, top, path)
    else:
        kind = _kind(type_)
        problem = None if kind else f'the type {type_} cannot be converted to arrays'
        if pa.types.is_null(type_):
            problem = 'it has no values'
        yield Column(name, top, path, kind or '', problem=problem)


def select(columns: Sequence[Column], keys: Sequence[str] | None) -> list[Column]:
    """Returns the columns to read, in the order of the keys.

    Args:
        columns: all columns of the table.
        keys: names of fields, or of struct columns (which select all of their fields); None for
            all.

    Raises:
        ValueError: if a key is unknown, or a column cannot be read.
    """
    selected = list(columns)
    if keys is not None:
        if isinstance(keys, str):
            raise ValueError(f"keys: expected a sequence of names, got '{keys}'; write ('{keys}',)")
        # In the order of the keys, and for each struct in the order of its fields.
        selected = [c for key in keys for c in columns if _matches_key(c.name, key)]
        unknown = [k for k in keys if not any(_matches_key(c.name, k) for c in columns)]
        if unknown:
            known = dict.fromkeys(c.name for c in columns)
            raise ValueError(f'keys: unknown {sorted(unknown)}; the fields are {", ".join(known)}')
    for column in selected:
        if column.problem:
            advice = _advice(column, selected)
            raise ValueError(f'column {column.name!r}: {column.problem}. {advice}')
    names = [column.name for column in selected]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f'duplicate fields {duplicates}; rename a column, or list each key once')
    return selected


def _matches_key(name: str, key: str) -> bool:
    return name == key or name.startswith(f'{key}.')


def _advice(column: Column, columns: Sequence[Column]) -> str:
    readable = tuple(c.name for c in columns if not c.problem and c is not column)
    leave_out = f', or leave it out: keys={readable}' if readable else ''
    return f'Convert it with Dataset.map and save_to_disk{leave_out}'


def check(column: Column, array: pa.ChunkedArray, columns: Sequence[Column]) -> str | None:
    """Checks a whole column by its metadata (null counts, list offsets), without reading values.

    Returns:
        A message if lists differ in length from example to example, or None.

    Raises:
        ValueError: if values are missing and the type cannot represent that.
    """
    missing = 0
    lengths: dict[int, tuple[int, int]] = {}
    for chunk in array.chunks:
        for depth, level in enumerate(_levels(chunk, column)):
            # Null counts and offsets are metadata, so this takes milliseconds for millions of rows.
            missing += level.null_count if _forbids_null(level, column) else 0
            if _is_list(level.type) and len(level) <= _MOST_LISTS and len(level):
                low, high = _length_range(level)
                before = lengths.get(depth, (low, high))
                lengths[depth] = min(low, before[0]), max(high, before[1])
    if missing:
        raise ValueError(
            f'column {column.name!r}: {missing:,} values are missing (null); only float columns '
            f'can have these, as NaN. Fill them in or drop these rows. {_advice(column, columns)}'
        )
    different = [each for each in lengths.values() if each[0] != each[1]]
    return _ragged_message(column, *different[0]) if different else None


def _ragged_message(column: Column, low: int, high: int) -> str:
    return (
        f'column {column.name!r} has lists of {low} to {high} values, and a batch needs one '
        'length: pad or truncate them with Dataset.map and save_to_disk, or in a stage '
        '(trainer.data.stages) of trainer.data.streaming:StreamLoader'
    )


def to_numpy(column: Column, array: pa.ChunkedArray) -> np.ndarray:
    """Returns the values of all rows, (rows, ...), in a new, writable array.

    Raises:
        ValueError: if values are missing, or lists or images differ in length or shape.
    """
    # One chunk, so that the values of a column are one array.
    levels = list(_levels(array.combine_chunks(), column))
    if any(level.null_count and _forbids_null(level, column) for level in levels):
        raise ValueError(f'column {column.name!r}: a value is missing (null)')
    shape = [len(levels[0])]
    for level in levels:
        if _is_list(level.type):
            low, high = _length_range(level) if len(level) else (0, 0)
            if low != high:
                raise ValueError(_ragged_message(column, low, high))
            shape.append(low)
    values = _values(column, levels[-1])
    # Arrow's memory is read-only and shared; transforms may change arrays in place.
    values = values if values.flags.writeable else values.copy()
    return values.reshape(*shape, *values.shape[1:])


def _levels(array: pa.Array, column: Column) -> Iterator[pa.Array]:
    """Yields the nested arrays from the column down to its values: lists, their items, etc."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = list(column.path)
    while True:
        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        elif pa.types.is_struct(array.type) and path:
            # Unlike `array.field` it carries on what the struct is missing.
            array = pc.struct_field(array, [path.pop(0)])
        elif _is_list(array.type):
            yield array
            array = array.flatten()
        else:
            yield array
            return


def _length_range(lists: pa.Array) -> tuple[int, int]:
    import pyarrow.compute as pc

    # For lists of a fixed size too; a null list has length null, which `min_max` skips.
    limits = pc.min_max(pc.list_value_length(lists)).as_py()
    return limits['min'] or 0, limits['max'] or 0


def _forbids_null(level: pa.Array, column: Column) -> bool:
    import pyarrow as pa

    return not (pa.types.is_floating(level.type) and column.kind == 'number')


def _values(column: Column, array: pa.Array) -> np.ndarray:
    import pyarrow as pa

    if column.kind == 'image':
        return _stack_images(column, [_decode_image(column, x) for x in array.to_pylist()])
    if column.kind == 'text':
        # Text of a fixed width: numpy has no other kind without objects.
        return np.array(array.to_pylist(), np.str_)
    if column.kind == 'bytes':  # numpy's bytes dtype would strip trailing zeros.
        values = np.empty(len(array), object)
        values[:] = array.to_pylist()
        return values
    if column.kind == 'decimal':
        array = array.cast(pa.float64())
    elif column.kind == 'time':
        # numpy has no time of day: it becomes the duration since midnight, in the unit of the
        # column.
        unit = array.type.unit
        whole = pa.int32() if pa.types.is_time32(array.type) else pa.int64()
        return array.cast(whole).to_numpy().astype(np.int64).view(f'm8[{unit}]')
    return array.to_numpy(zero_copy_only=False)


def _decode_image(column: Column, value: Any) -> np.ndarray:
    try:
        return np.asarray(column.feature.decode_example(value))
    except ImportError as error:
        raise ValueError(f'column {column.name!r}: {error}') from error


def _stack_images(column: Column, images: list[np.ndarray]) -> np.ndarray:
    kinds = dict.fromkeys(f'{x.dtype} {x.shape}' for x in images)
    if len(kinds) > 1:
        raise ValueError(
            f'column {column.name!r} has images of {" and ".join(list(kinds)[:2])}; a batch needs '
            'one shape and type: resize or crop them with Dataset.map and save_to_disk, or in a '
            'stage of trainer.data.streaming:StreamLoader'
        )
    return np.stack(images) if images else np.zeros(0, np.uint8)


@functools.cache
def _is_list(type_: pa.DataType) -> bool:
    import pyarrow as pa

    tests = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return any(test(type_) for test in tests)


@functools.cache
def _kind(type_: pa.DataType) -> str | None:
    import pyarrow as pa

    for name, kind in _KINDS.items():
        # Older versions of Arrow have no views of text and bytes.
        test = getattr(pa.types, f'is_{name}', None)
        if test is not None and test(type_):
            return kind
    return None
