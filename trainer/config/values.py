# SPDX-License-Identifier: Apache-2.0
"""Texts of the command line as values of the type that a config key has."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from trainer.config import schema
from trainer.config.durations import Duration, is_duration
from trainer.config.errors import UserError

# The shell takes quotes away: --config.mesh={"data": 2} arrives as {data: 2}.
_UNREADABLE = (
    'The text is neither JSON nor a Python literal. Are quotes missing? In a shell a dict is '
    "written as in '{\"a\": 1}', a tuple as in '(1, 2)'."
)
_BOOLS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}


def literal(text: str) -> Any:
    """Returns the JSON or Python literal that a text is, or the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def parse(text: str, old: Any, hint: Any, path: str) -> Any:
    """Returns the value of a text of the command line for a key.

    Raises:
        UserError: as `convert`.
    """
    value = literal(text)
    try:
        return convert(value, text, old, hint, path)
    except UserError as error:
        if isinstance(value, str) and text.startswith(('{', '[', '(')):
            raise UserError(f'{error}\n{_UNREADABLE}') from error
        raise


def convert(value: Any, text: str, old: Any, hint: Any, path: str) -> Any:
    """Returns a literal as a value of the type that a key has.

    Args:
        value: the literal.
        text: how it was written.
        old: the key's value now; None if it has none.
        hint: the key's type if it is a fixed key, else None.
        path: 'config.a.b', for messages.

    Raises:
        UserError: if it is no value of that type.
    """
    if hint is not None and not isinstance(value, Mapping):
        return _for_hint(text, value, hint, path)
    if old is None or old is schema.REQUIRED or isinstance(value, Mapping):
        return value
    return _like(text, value, old, path)


def _for_hint(text: str, value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _wants_text(hint):
        value = text
    if value is not None and schema.without_none(hint) is bool:
        return _bool(text, path)
    if isinstance(value, list):
        value = tuple(value)
    checked = schema.check(value, hint, path, {})
    return str(checked) if isinstance(checked, Duration) else checked


def _wants_text(hint: Any) -> bool:
    return hint is str or hint is Duration


def _like(text: str, value: Any, old: Any, path: str) -> Any:
    """Returns a literal as a value of the type of `old`."""
    if isinstance(old, bool):
        return _bool(text, path)
    if isinstance(old, Mapping):
        # A schedule may become a number; everything else that is an object stays one.
        if isinstance(value, (int, float)) or value is None:
            return value
        raise UserError(f'{path}: expected a dict or a number, got {text!r}')
    if isinstance(old, str):
        return _text(text, value, old, path)
    if isinstance(old, (tuple, list)):
        return _sequence(text, value, old, path)
    return _number(text, value, old, path)


def _bool(text: str, path: str) -> bool:
    if text.lower() not in _BOOLS:
        raise UserError(f'{path}: expected true or false, got {text!r}')
    return _BOOLS[text.lower()]


def _text(text: str, value: Any, old: str, path: str) -> Any:
    # Of free strings, 'never' is a word like any other.
    if is_duration(old) and old != 'never':
        in_optimizer = path.startswith('config.optimizer.')
        if isinstance(value, int) and in_optimizer:
            return value
        return str(Duration.parse(text, path, zero=in_optimizer))
    # Quotes are the shell's affair, but '"a"' means a.
    return value if isinstance(value, str) else text


def _number(text: str, value: Any, old: Any, path: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return float(value)
    if isinstance(old, int) and is_number and isinstance(value, int):
        return value
    if isinstance(old, int) and is_duration(text) and path.startswith('config.optimizer.'):
        return text
    raise UserError(f'{path}: expected {type(old).__name__}, got {text!r}')


def _sequence(text: str, value: Any, old: Any, path: str) -> Any:
    if not isinstance(value, (tuple, list)):
        raise UserError(f'{path}: expected a {type(old).__name__} like {old!r}, got {text!r}')
    fixed = isinstance(old, tuple) and any(not isinstance(x, (str, Mapping)) for x in old)
    if fixed and len(value) != len(old):
        raise UserError(
            f'{path}: expected {len(old)} elements, as in {old!r}, got {len(value)}: {text!r}'
        )
    patterns = old if fixed else (old[0],) * len(value) if old else value
    elements = [
        x
        if isinstance(p, Mapping) and isinstance(x, Mapping)
        else _like(written(x), x, p, f'{path}[{i}]')
        for i, (x, p) in enumerate(zip(value, patterns, strict=True))
    ]
    return type(old)(elements)


def written(value: Any) -> str:
    """Returns a literal as a text of the command line."""
    return value if isinstance(value, str) else repr(value)
