# SPDX-License-Identifier: Apache-2.0
"""Columns of Arrow tables as numpy arrays, in the types that the columns have.

The formats of `datasets` choose a dtype by the values of each call, so one row and many rows of the
same column differ. Here the type of the column decides alone.
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

# Lengths of lists are compared over a whole column up to so many lists: 40 MB of offsets.
_MOST_LISTS = 10_000_000
# The kinds of values, by the predicates of `pyarrow.types`.
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
    """A field of the examples: a column, or what is at one place in the structs of a column.

    Attributes:
        name: of the field: the column's, and the names inside it, joined by dots.
        top: the column's name.
        path: numbers of the struct fields on the way to the values.
        kind: of the values: one of `_KINDS`, or 'image'.
        feature: of `datasets`, which decodes an image.
        problem: why the values cannot be read, or None.
    """

    name: str
    top: str
    path: tuple[int, ...]
    kind: str
    feature: Any = None
    problem: str | None = None


def of_schema(schema: pa.Schema, features: Mapping[str, Any] | None) -> list[Column]:
    """Returns the columns of a table, those that cannot be read among them.

    Args:
        schema: of the table.
        features: of `datasets`, by column; None if the types say all.
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

    if is_decoded(feature):
        is_image = type(feature).__name__ == 'Image'
        problem = None if is_image else f'{type(feature).__name__} is not read as arrays'
        yield Column(name, top, path, 'image', feature, problem)
    elif isinstance(type_, pa.BaseExtensionType):
        yield from _columns(type_.storage_type, None, name, top, path)
    elif pa.types.is_dictionary(type_):
        yield from _columns(type_.value_type, None, name, top, path)
    elif pa.types.is_struct(type_):
        inner = feature if isinstance(feature, dict) else {}
        for number, field in enumerate(type_):
            below = f'{name}.{field.name}', top, (*path, number)
            yield from _columns(field.type, inner.get(field.name), *below)
    elif _is_list(type_):
        yield from _columns(type_.value_type, getattr(feature, 'feature', None), name, top, path)
    else:
        kind = _kind(type_)
        problem = None if kind else f'the type {type_} is not read as arrays'
        if pa.types.is_null(type_):
            problem = 'it has no values at all'
        yield Column(name, top, path, kind or '', problem=problem)


def chosen(columns: Sequence[Column], keys: Sequence[str] | None) -> list[Column]:
    """Returns the columns to read, in the order of the keys.

    Args:
        columns: all of them.
        keys: names of fields, or of columns whose fields are all meant; None for all.

    Raises:
        ValueError: if a key is unknown, or a column cannot be read.
    """
    found = list(columns)
    if keys is not None:
        if isinstance(keys, str):
            raise ValueError(f"keys: expected a sequence of names, got '{keys}'; write ('{keys}',)")
        found = [c for key in keys for c in columns if _is_meant(c.name, key)]
        unknown = [k for k in keys if not any(_is_meant(c.name, k) for c in columns)]
        if unknown:
            known = dict.fromkeys(c.name for c in columns)
            raise ValueError(f'keys: {sorted(unknown)} are none of {", ".join(known)}')
    for column in found:
        if column.problem:
            raise ValueError(f'column {column.name!r}: {column.problem}. {_advice(column, found)}')
    names = [column.name for column in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'{twice} name two fields each; rename a column, or list each key once')
    return found


def _is_meant(name: str, key: str) -> bool:
    return name == key or name.startswith(f'{key}.')


def _advice(column: Column, columns: Sequence[Column]) -> str:
    good = tuple(c.name for c in columns if not c.problem and c is not column)
    leave_out = f', or leave it out: keys={good}' if good else ''
    return f'Convert it with Dataset.map and save_to_disk{leave_out}'


def check(column: Column, array: pa.ChunkedArray, columns: Sequence[Column]) -> str | None:
    """Looks at all values of a column, without reading more than what is known of them.

    Returns:
        What differs from example to example, or None.

    Raises:
        ValueError: if values are missing and the type has no value for that.
    """
    missing = 0
    lengths: dict[int, tuple[int, int]] = {}
    for chunk in array.chunks:
        for depth, level in enumerate(_levels(chunk, column)):
            missing += level.null_count if _needs_all(level, column) else 0
            if _is_list(level.type) and len(level) <= _MOST_LISTS and len(level):
                low, high = _lengths(level)
                before = lengths.get(depth, (low, high))
                lengths[depth] = min(low, before[0]), max(high, before[1])
    if missing:
        raise ValueError(
            f'column {column.name!r}: {missing:,} values are missing (null), which only floats can '
            f'represent, as NaN. Fill them in or drop these rows. {_advice(column, columns)}'
        )
    different = [each for each in lengths.values() if each[0] != each[1]]
    return _ragged(column, *different[0]) if different else None


def _ragged(column: Column, low: int, high: int) -> str:
    return (
        f'column {column.name!r} has lists of {low} to {high} values, and a batch needs one '
        'length: pad or cut them with Dataset.map and save_to_disk, or read them with '
        'trainer.data.streaming:StreamLoader and a stage that does so (trainer.data.stages)'
    )


def to_numpy(column: Column, array: pa.ChunkedArray) -> np.ndarray:
    """Returns the values of all rows, (rows, ...), in an array of its own.

    Raises:
        ValueError: if values are missing, or lists or images differ in length or shape.
    """
    levels = list(_levels(array.combine_chunks(), column))
    if any(level.null_count and _needs_all(level, column) for level in levels):
        raise ValueError(f'column {column.name!r}: a value is missing (null)')
    shape = [len(levels[0])]
    for level in levels:
        if _is_list(level.type):
            low, high = _lengths(level) if len(level) else (0, 0)
            if low != high:
                raise ValueError(_ragged(column, low, high))
            shape.append(low)
    values = _values(column, levels[-1])
    values = values if values.flags.writeable else values.copy()
    return values.reshape(*shape, *values.shape[1:])


def _levels(array: pa.Array, column: Column) -> Iterator[pa.Array]:
    """Yields the arrays from the column to its values: lists, what is in them, and so on."""
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


def _lengths(lists: pa.Array) -> tuple[int, int]:
    import pyarrow.compute as pc

    found = pc.min_max(pc.list_value_length(lists)).as_py()
    return found['min'] or 0, found['max'] or 0


def _needs_all(level: pa.Array, column: Column) -> bool:
    import pyarrow as pa

    return not (pa.types.is_floating(level.type) and column.kind == 'number')


def _values(column: Column, array: pa.Array) -> np.ndarray:
    import pyarrow as pa

    if column.kind == 'image':
        return _stacked(column, [_decoded(column, x) for x in array.to_pylist()])
    if column.kind == 'text':
        return np.array(array.to_pylist(), np.str_)
    if column.kind == 'bytes':  # Of numpy's own type they would lose the zeros at their ends.
        values = np.empty(len(array), object)
        values[:] = array.to_pylist()
        return values
    if column.kind == 'decimal':
        array = array.cast(pa.float64())
    elif column.kind == 'time':
        unit = array.type.unit
        whole = pa.int32() if pa.types.is_time32(array.type) else pa.int64()
        return array.cast(whole).to_numpy().astype(np.int64).view(f'm8[{unit}]')
    return array.to_numpy(zero_copy_only=False)


def _decoded(column: Column, value: Any) -> np.ndarray:
    try:
        return np.asarray(column.feature.decode_example(value))
    except ImportError as error:
        raise ValueError(f'column {column.name!r}: {error}') from error


def _stacked(column: Column, images: list[np.ndarray]) -> np.ndarray:
    found = dict.fromkeys(f'{x.dtype} {x.shape}' for x in images)
    if len(found) > 1:
        raise ValueError(
            f'column {column.name!r} has images of {" and ".join(list(found)[:2])}; a batch needs '
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
        test = getattr(pa.types, f'is_{name}', None)
        if test is not None and test(type_):
            return kind
    return None
