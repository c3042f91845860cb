# SPDX-License-Identifier: Apache-2.0
"""Configs as text: the resolved values with their origins, and every key that may be set."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import diff, schema, sentences
from trainer.config.durations import Duration
from trainer.config.overrides import Override

# The columns of `--helpconfig`; what does not fit moves the others to the right.
_WIDTH, _FLAG_WIDTH, _TYPE_WIDTH = 100, 38, 10
_INDENT: Any = {
    'initial_indent': ' ' * 6,
    'subsequent_indent': ' ' * 6,
    'break_long_words': False,
    'break_on_hyphens': False,
}


def format_resolved(config: Mapping[str, Any], overrides: Sequence[Override]) -> str:
    """Returns 'path = value' lines; an origin stands behind each value that is not the file's.

    Args:
        config: plain, overrides applied.
        overrides: those that were applied.
    """
    lines = []
    origins = _origins(overrides)
    for path, value in _leaves(config, ''):
        # A tuple is shown whole, and may have been set whole and by its elements.
        places = (place for place in origins if place == path or place.startswith(f'{path}['))
        notes = list(dict.fromkeys(origins[place] for place in places))
        if path.endswith('accepts_any') and value:
            notes.append('unchecked: the target takes any argument')
        lines.append((f'{path} = {value!r}', ', '.join(notes)))
    for path, _, default in schema.defaults(config):
        lines.append((f'{path} = {_plain_default(default)!r}', 'default'))
    return '\n'.join(f'{text}  # {note}' if note else text for text, note in lines)


def format_helpconfig(config: Mapping[str, Any]) -> str:
    """Returns every key of a config with its type and value, and the fixed keys it leaves out.

    Below each fixed key is what it is for. No line is longer than 100 characters, unless it holds a
    single value.
    """
    rows = [
        (f'--config.{path}', _type_name(path, value), repr(value))
        for path, value in _leaves(config, '')
    ]
    for path, hint, default in [*schema.defaults(config), *schema.optional_fields(config)]:
        rows.append((f'--config.{path}', schema.describe(hint), repr(_plain_default(default))))
    lines = ['Keys of the config (type, value):']
    for flag, hint, value in rows:
        line = f'  {flag:<{_FLAG_WIDTH}}  {hint:<{_TYPE_WIDTH}}  {value}'
        if len(line) > _WIDTH:
            line = f'  {flag}  {hint}\n    = {value}'
        sentence = sentences.sentence_at(re.split(r'[.\[]', flag.removeprefix('--config.')))
        lines += [line, *textwrap.wrap(sentence, _WIDTH, **_INDENT)]
    return '\n'.join(lines)


def _type_name(path: str, value: Any) -> str:
    hint = schema.type_at(path.split('.'))
    return type(value).__name__ if hint is None else schema.describe(hint)


def _plain_default(default: Any) -> Any:
    return str(default) if isinstance(default, Duration) else default


def _origins(overrides: Sequence[Override]) -> dict[str, str]:
    """Returns the override that set each path last; a merge sets only what it changed."""
    origins: dict[str, str] = {}
    for override in overrides:
        origins.update((leaf, 'default') for leaf in override.default_paths)
        text = f'--config.{override.path}={override.text}'
        place = override.value_path
        origins[place] = text
        for change in diff.diff(override.old, override.new):
            inner = change.path and not change.path.startswith('[')
            where = f'{place}.{change.path}' if inner else f'{place}{change.path}'
            origins.update((leaf, text) for leaf, _ in _leaves(change.new, where))
        for path, value in override.linked_values.items():
            origins.update((leaf, text) for leaf, _ in _leaves(value, path))
    return origins


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of everything that is not a container of objects."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (tuple, list)) and any(isinstance(x, Mapping) for x in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f'{path}[{index}]')
    else:
        yield path, node
