# SPDX-License-Identifier: Apache-2.0
"""Formats configs as text: resolved values with their origins, and the list of all keys."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import diff, schema, sentences
from trainer.config.columns import align_columns
from trainer.config.durations import Duration
from trainer.config.overrides import Override
from trainer.config.sections import Sections

# Widths of the lines, and the largest ones of the columns, of `--helpconfig`.
_WIDTH, _FLAG_WIDTH, _TYPE_WIDTH = 100, 38, 10
_INDENT: Any = {
    'initial_indent': ' ' * 6,
    'subsequent_indent': ' ' * 6,
    'break_long_words': False,
    'break_on_hyphens': False,
}


def format_resolved(config: Mapping[str, Any], overrides: Sequence[Override]) -> str:
    """Returns 'path = value' lines, with the origin of each value that the file does not set.

    Args:
        config: the plain config, with overrides applied.
        overrides: the overrides that were applied.
    """
    lines = []
    origins = _origins(overrides)
    for path, value in _leaves(config, ''):
        # A tuple is printed on one line, but each of its elements may have an origin of its own.
        set_paths = (each for each in origins if each == path or each.startswith(f'{path}['))
        notes = list(dict.fromkeys(origins[each] for each in set_paths))
        if path.endswith('accepts_any') and value:
            notes.append('arguments are not checked')
        lines.append((f'{path} = {value!r}', ', '.join(notes)))
    for path, _, default in schema.defaults(config):
        lines.append((f'{path} = {plain_default(default)!r}', 'default'))
    return '\n'.join(f'{text}  # {note}' if note else text for text, note in lines)


def format_helpconfig(config: Mapping[str, Any]) -> str:
    """Returns every key of a config with its type and value, and the fixed keys that it may set.

    The description of a fixed key follows it.
    """
    rows = [
        (f'--config.{path}', _type_name(path, value), repr(value))
        for path, value in _leaves(config, '')
    ]
    for path, hint, default in [*schema.defaults(config), *schema.optional_fields(config)]:
        rows.append((f'--config.{path}', schema.describe(hint), repr(plain_default(default))))
    return _format_keys('Keys of the config (type, value):', rows)


def format_all_keys() -> str:
    """Returns every fixed key that a config may have, with its type, default and description."""
    return _format_keys('All keys (type, default):', list(_all_keys(Sections, '')))


def _all_keys(section: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yields (flag, type, default) of each key of a section, and of the sections in it."""
    for field in dataclasses.fields(section):
        if field.metadata.get('rest'):
            continue
        path, hint = f'{prefix}{field.name}', schema.fields(section)[field.name]
        default = schema.default_of(field)
        # A section that exists by default is shown by its keys, which follow.
        exists = schema.is_section(type(default))
        text = '' if exists else repr(plain_default(default))
        yield f'--config.{path}', schema.describe(hint), text
        inner = schema.section_below(path, hint)
        if inner is not None:
            yield from _all_keys(inner[1], f'{inner[0]}.')


def _format_keys(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """Returns a list of (flag, type, value), each with its description.

    No line has more than 100 characters, unless it consists of a single value.
    """
    lines = [title]
    aligned = align_columns(rows, widest=(_FLAG_WIDTH, _TYPE_WIDTH))
    for (flag, hint, value), row in zip(rows, aligned, strict=True):
        line = f'  {row}'
        if len(line) > _WIDTH:
            line = f'  {flag}  {hint}\n    = {value}'
        # An index becomes a key such as '0]', which no section has, so it gets no sentence.
        sentence = sentences.sentence_at(re.split(r'[.\[]', flag.removeprefix('--config.')))
        lines += [line, *textwrap.wrap(sentence, _WIDTH, **_INDENT)]
    return '\n'.join(lines)


def _type_name(path: str, value: Any) -> str:
    hint = schema.type_at(path.split('.'))
    return type(value).__name__ if hint is None else schema.describe(hint)


def plain_default(default: Any) -> Any:
    """Returns a default as a config would write it: '1 epoch' for a Duration."""
    if not isinstance(default, Duration):
        return default
    # `str` keeps the plural, because the configs in work directories have it, and are compared.
    text = str(default)
    return text.removesuffix('s') if default.value == 1 else text


def _origins(overrides: Sequence[Override]) -> dict[str, str]:
    """Returns the override that set each path last, as text by path.

    An override with a dict counts only for the values that it changed.
    """
    origins: dict[str, str] = {}
    for override in overrides:
        origins.update((leaf, 'default') for leaf in override.default_paths)
        text = f'--config.{override.path}={override.text}'
        base = override.value_path
        origins[base] = text
        for change in diff.diff(override.old, override.new):
            # The path of a change is relative: '' (the value itself), 'key', or '[index]'.
            is_key = change.path and not change.path.startswith('[')
            where = f'{base}.{change.path}' if is_key else f'{base}{change.path}'
            origins.update((leaf, text) for leaf, _ in _leaves(change.new, where))
        for path, value in override.linked_values.items():
            origins.update((leaf, text) for leaf, _ in _leaves(value, path))
    return origins


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the (path, value) pairs that are printed on a line of their own.

    A tuple or list is one value, unless it contains dicts.
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (tuple, list)) and any(isinstance(x, Mapping) for x in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f'{path}[{index}]')
    else:
        yield path, node
