# SPDX-License-Identifier: Apache-2.0
"""Checks the form of checkpoint metadata."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from trainer.config.errors import short_repr
from trainer.config.json_text import is_int, is_number, type_name

# Keys in every checkpoint of a run; a resume needs them.
OF_A_RUN = ('data_digest', 'metrics', 'evaluated')


def problem(meta: Any, needed: Sequence[str] = ()) -> str | None:
    """Returns what is wrong with metadata, or None.

    Args:
        meta: any JSON value.
        needed: keys that it must have.
    """
    if not isinstance(meta, dict):
        return f'its metadata is {type_name(meta)}, and not an object'
    missing = [key for key in ('digest', *needed) if key not in meta]
    if missing:
        return f'its metadata lacks {", ".join(map(repr, missing))}'
    for key, (expected, is_right) in _FORMS.items():
        if key in meta and not is_right(meta[key]):
            return (
                f'{key!r} of its metadata is {short_repr(meta[key], limit=40)}, and not {expected}'
            )
    return None


def _count(value: Any) -> bool:
    return is_int(value) and 0 <= value < 2**63


def _hex(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 16 and set(value) <= set('0123456789abcdef')


def _each(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


def _texts(value: Any) -> bool:
    return _each(value, lambda x: isinstance(x, str))


def _metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(x is None or is_number(x) for x in value.values())


def _batch_sizes(value: Any) -> bool:
    """Whether a value is a list of (first step, batch size), from step 0 on."""
    if not _each(value, lambda x: _each(x, _count) and len(x) == 2 and x[1] > 0) or not value:
        return False
    starts = [start for start, _ in value]
    return starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))


def _data(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not {'examples', 'first example'} <= value.keys():
        return False
    first = value['first example']
    is_known = value['examples'] is None or _count(value['examples'])
    return is_known and isinstance(first, dict) and _texts(list(first.values()))


def _config(value: Any) -> bool:
    """Whether a value is a config with valid sections where a resume reads them."""
    if not isinstance(value, dict):
        return False
    data, checkpoint = value.get('data', {}), value.get('checkpoint', {})
    if not isinstance(data, dict) or not isinstance(checkpoint, dict):
        return False
    size, best = data.get('batch_size', 1), checkpoint.get('best')
    if not _count(size) or not size:
        return False
    return not best or (isinstance(best, dict) and isinstance(best.get('metric'), str))


def _early_stopping(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not {'best', 'count', 'stopped'} <= value.keys():
        return False
    best = value['best'] is None or is_number(value['best'])
    return best and _count(value['count']) and isinstance(value['stopped'], bool)


def _health(value: Any) -> bool:
    """Whether a value is a row of 32-bit integers, or one such row per ensemble member."""

    def is_row(row: Any) -> bool:
        return bool(row) and _each(row, lambda x: is_int(x) and -(2**31) <= x < 2**31)

    return is_row(value) or (bool(value) and _each(value, is_row))


def _empty(value: Any) -> bool:
    def is_array(entry: Any) -> bool:
        if not isinstance(entry, list) or len(entry) != 3:
            return False
        names, dtype, shape = entry
        return _texts(names) and _dtype(dtype) and _each(shape, _count) and 0 in shape

    return _each(value, is_array)


def _dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(jnp.dtype(value).name)
    except TypeError:
        return False


# The expected form of each key, if present: a description for messages, and a predicate.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'digest': ('a string', lambda x: isinstance(x, str)),
    'step': ('a number of steps', _count),
    'data_digest': ('16 hexadecimal digits', _hex),
    'data_states': ('a list', lambda x: isinstance(x, list)),
    'metrics': ('an object of numbers', _metrics),
    'evaluated': ('a list of names', _texts),
    'batch_sizes': ('a list of steps and sizes', _batch_sizes),
    'data': ('a description of the data', _data),
    'config': ('a config', _config),
    'early_stopping': ('a state of early stopping', _early_stopping),
    'health': ('a list of integers', _health),
    'empty': ('a list of arrays', _empty),
}
