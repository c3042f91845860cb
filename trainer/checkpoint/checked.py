# SPDX-License-Identifier: Apache-2.0
"""Checks the form of checkpoint metadata.

Files may be truncated, edited by hand or written by other programs, so each value is checked before
it is used: a bad one should be a message that names its key, not a traceback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from trainer.config.errors import short_repr
from trainer.config.json_text import is_int, is_number, type_name

# Keys in every checkpoint of a run; a resume needs them.
RUN_KEYS = ('data_digest', 'metrics', 'evaluated')


def find_problem(meta: Any, needed: Sequence[str] = ()) -> str | None:
    """Returns what is wrong with metadata, or None.

    Args:
        meta: any JSON value.
        needed: keys that it must have.
    """
    if not isinstance(meta, dict):
        return f'its metadata is {type_name(meta)}, not an object'
    missing = [key for key in ('digest', *needed) if key not in meta]
    if missing:
        return f'its metadata lacks {", ".join(map(repr, missing))}'
    for key, (expected, is_right) in _FORMS.items():
        if key in meta and not is_right(meta[key]):
            return f'{key!r} in its metadata is {short_repr(meta[key], limit=40)}, not {expected}'
    return None


def _is_count(value: Any) -> bool:
    return is_int(value) and 0 <= value < 2**63  # Larger ones overflow in numpy.


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 16 and set(value) <= set('0123456789abcdef')


def _is_list_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


def _is_text_list(value: Any) -> bool:
    return _is_list_of(value, lambda x: isinstance(x, str))


def _is_text_object(value: Any) -> bool:
    return isinstance(value, dict) and _is_text_list(list(value.values()))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(x is None or is_number(x) for x in value.values())


def _is_batch_sizes(value: Any) -> bool:
    """Whether a value is a list of (first step, batch size), from step 0 on."""
    if (
        not _is_list_of(value, lambda x: _is_list_of(x, _is_count) and len(x) == 2 and x[1] > 0)
        or not value
    ):
        return False
    starts = [start for start, _ in value]
    return starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))


def _is_data(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not {'examples', 'first example'} <= value.keys():
        return False
    first = value['first example']
    is_known = value['examples'] is None or _is_count(value['examples'])
    return is_known and isinstance(first, dict) and _is_text_list(list(first.values()))


def _is_config(value: Any) -> bool:
    """Whether a value is a config with valid sections where a resume reads them."""
    if not isinstance(value, dict):
        return False
    data, checkpoint = value.get('data', {}), value.get('checkpoint', {})
    if not isinstance(data, dict) or not isinstance(checkpoint, dict):
        return False
    size, best = data.get('batch_size', 1), checkpoint.get('best')
    if not _is_count(size) or not size:
        return False
    return not best or (isinstance(best, dict) and isinstance(best.get('metric'), str))


def _is_early_stopping(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not {'best', 'count', 'stopped'} <= value.keys():
        return False
    best = value['best'] is None or is_number(value['best'])
    return best and _is_count(value['count']) and isinstance(value['stopped'], bool)


def _is_health(value: Any) -> bool:
    """Whether a value is a list of 32-bit integers, or one such list per ensemble member."""

    def is_list(value: Any) -> bool:
        return bool(value) and _is_list_of(value, lambda x: is_int(x) and -(2**31) <= x < 2**31)

    return is_list(value) or (bool(value) and _is_list_of(value, is_list))


def _is_empty_arrays(value: Any) -> bool:
    def is_array(entry: Any) -> bool:
        if not isinstance(entry, list) or len(entry) != 3:
            return False
        names, dtype, shape = entry
        return (
            _is_text_list(names)
            and _is_dtype(dtype)
            and _is_list_of(shape, _is_count)
            and 0 in shape
        )

    return _is_list_of(value, is_array)


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(jnp.dtype(value).name)
    except TypeError:
        return False


# The expected form of each key, if present: a description for messages, and a predicate.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'digest': ('a string', lambda x: isinstance(x, str)),
    'step': ('a number of steps', _is_count),
    'data_digest': ('16 hexadecimal digits', _is_digest),
    'data_states': ('a list', lambda x: isinstance(x, list)),
    'metrics': ('an object of numbers', _is_metrics),
    'evaluated': ('a list of names', _is_text_list),
    'batch_sizes': ('a list of steps and sizes', _is_batch_sizes),
    'data': ('a description of the data', _is_data),
    'config': ('a config', _is_config),
    'versions': ('an object of texts', _is_text_object),
    'early_stopping': ('a state of early stopping', _is_early_stopping),
    'health': ('a list of integers', _is_health),
    'empty': ('a list of arrays', _is_empty_arrays),
}
