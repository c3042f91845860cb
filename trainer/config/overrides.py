# SPDX-License-Identifier: Apache-2.0
"""Command-line overrides: `--config.a.b=value`, checked against the config before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from trainer.config import diff, literals, lookup, paths, schema, targets, values
from trainer.config.durations import is_duration
from trainer.config.errors import UserError, short_repr, shorten
from trainer.config.loading import to_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """One assignment, as it was applied.

    Attributes:
        path: 'optimizer.learning_rate'.
        value_path: path of `new`: `path`, or the object whose target `path` sets.
        text: the text after '='.
        old: the value before, None if there was none.
        new: the value after.
        default_paths: paths that the file leaves out and that were set to their defaults.
        linked_values: new values at other paths that share a reference with this one, by path.
        notes: lines to print.
    """

    path: str
    value_path: str
    text: str
    old: Any
    new: Any
    default_paths: tuple[str, ...] = ()
    linked_values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse_argv(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """Splits a command line into (--config, assignments, everything else).

    Both `--config.a=1` and `--config.a 1` are understood.

    Raises:
        UserError: if a value is missing, or two config files are named.
    """
    spec: str | None = None
    assignments: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition('=')
        name = '-' + name.lstrip('-') if name.startswith('-') else name
        if name != '-config' and not name.startswith('-config.'):
            rest.append(word)
            continue
        if not equals:
            value = next(words, '--')
        if (not equals and value.startswith('--')) or (name == '-config' and not value):
            flag = shorten(word.partition('=')[0])
            raise UserError(f'{flag} needs a value: {flag}=...')
        if name == '-config':
            if spec not in (None, value):
                raise UserError(
                    f'--config is given twice: {short_repr(spec)} and {short_repr(value)}'
                )
            spec = value
        else:
            assignments.append((name.removeprefix('-config.'), value))
    return spec, assignments, rest


def from_python(value: Any, path: str) -> str:
    """Returns a value as it is written on the command line.

    Raises:
        UserError: for what a config cannot hold.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return value
    value = to_plain(value)
    literals.check_depth(value, f'config.{path}')
    value = _python_numbers(value)
    literals.check(value, f'config.{path}', paths.parse(path))
    return repr(value)


def _python_numbers(value: Any) -> Any:
    """Returns a value with Python's numbers for those of numpy and JAX, at every depth."""
    if isinstance(value, dict):
        return {_python_numbers(key): _python_numbers(inner) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_python_numbers, value))
    if hasattr(value, 'item') and getattr(value, 'ndim', None) == 0:
        return value.item()
    return value


def apply(
    config: ml_collections.ConfigDict, assignments: Sequence[tuple[str, str]]
) -> tuple[Override, ...]:
    """Changes the config in place.

    Raises:
        UserError: for a path that does not exist or a value of the wrong type.
    """
    with config.unlocked(), config.ignore_type():
        return tuple(_assign(config, path, text) for path, text in assignments)


def _assign(config: ml_collections.ConfigDict, path: str, text: str) -> Override:
    keys = paths.parse(path)
    default_paths = _fill_default(config, keys)
    old = lookup.value_at(config, keys)
    hint = schema.type_at(keys) or lookup.placeholder_type(config, keys)
    like, annotation = old, values.no_annotation
    if hint is None:
        node = paths.get(config, keys[:-1])
        like, hint, annotation = _argument_type(node, keys[-1], old, text, keys[:-1])
    new = values.parse(text, like, hint, keys, f'config.{path}', annotation)
    if isinstance(new, Mapping):
        new = paths.nest(new, f'config.{path}')  # A ConfigDict takes no key with a dot.
        literals.check(new, f'config.{path}', keys)
    given, notes = new, list[str]()
    if keys[-1] == 'target' and len(keys) > 1 and isinstance(new, str):
        keys, new, old = keys[:-1], {'target': new}, to_plain(paths.get(config, keys[:-1]))
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        new = _merge(old, new, keys, notes)
    before, value_path = to_plain(config), paths.join(keys)
    paths.store(config, keys, new)
    if isinstance(given, (Mapping, tuple, list)):
        lookup.check_names(config, given, keys)
    return Override(
        path=path,
        value_path=value_path,
        text=text,
        old=old,
        new=new,
        default_paths=default_paths,
        linked_values=_linked_values(config, before, value_path),
        notes=tuple(notes),
    )


def _linked_values(config: ml_collections.ConfigDict, before: Any, place: str) -> dict[str, Any]:
    """Returns the values that an assignment has set at paths other than `place`, by path."""
    references = dict(_references(config, ''))
    mine = references.get(place)
    # Also those that had this value before: their value now comes from this assignment.
    linked = {path: to_plain(ref) for path, ref in references.items() if ref is mine}
    linked.update({each.path: each.new for each in diff.diff(before, to_plain(config))})
    inside = (f'{place}.', f'{place}[')
    return {p: new for p, new in linked.items() if p != place and not p.startswith(inside)}


def _references(
    config: ml_collections.ConfigDict, path: str
) -> Iterator[tuple[str, ml_collections.FieldReference]]:
    for key, value in config.items(preserve_field_references=True):
        where = f'{path}.{key}' if path else str(key)
        if isinstance(value, ml_collections.FieldReference):
            yield where, value
        elif isinstance(value, ml_collections.ConfigDict):
            yield from _references(value, where)


def _fill_default(config: ml_collections.ConfigDict, keys: paths.Keys) -> tuple[str, ...]:
    """Stores the default object that a path leads into, so that the assignment merges with it."""
    for depth in range(1, len(keys) + 1):
        head = keys[:depth]
        default = schema.default_object(head)
        if default and not paths.contains(config, head):
            paths.store(config, head, default)
            return tuple(f'{paths.join(head)}.{key}' for key in default)
    return ()


def _merge(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: paths.Keys, notes: list[str]
) -> Any:
    """Returns `old` updated by `new` at every depth; a new target keeps what it accepts."""
    if not new or 'ref' in new or 'ref' in old:
        # An empty dict clears. A reference has no other keys: it replaces, and is replaced.
        return dict(new)
    path = f'config.{paths.join(keys)}'
    kept = dict(old)
    if 'target' in new and 'target' in old and new['target'] != old['target']:
        section = schema.section_at(keys)
        ours = schema.fields(section) if section is not None else {}
        fits = targets.accepted_keys(new['target'], kept, path) | set(ours)
        kept = {key: value for key, value in kept.items() if key in fits}
        dropped = [key for key in old if key not in (*kept, *new)]
        notes.extend(f'{path}.{key} dropped: {new["target"]} does not take it' for key in dropped)
    literals.check_names({**kept, **new}, path, keys)
    for key, value in new.items():
        before, inner_keys = kept.get(key), [*keys, key]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            kept[key] = _merge(before, value, inner_keys, notes)
            continue
        text, annotation = literals.to_text(value), values.no_annotation
        # A merged key is held to the same types as one set by its own path.
        inner = schema.type_at(inner_keys)
        if inner is None:
            before, inner, annotation = _argument_type({**kept, **new}, key, before, text, keys)
        kept[key] = values.convert(value, text, before, inner, f'{path}.{key}', annotation)
    return kept


def _argument_type(
    node: Any, key: str | int, old: Any, text: str, keys: paths.Keys
) -> tuple[Any, Any, values.Annotation]:
    """Returns what a new value is checked against: a value like it, a type, an annotation.

    Args:
        node: the object's dict.
        key: the argument.
        old: its value now.
        text: the new value as it was written.
        keys: path of the object.
    """
    path = f'config.{paths.join(keys)}'
    annotation = functools.partial(lookup.annotation, node, key, path)
    if old is None:
        steps = keys[:1] == ['optimizer'] and is_duration(text)
        return None, None if steps else lookup.argument_type(node, key, path), annotation
    if literals.literal(text) is None and lookup.takes_none(node, key, path):
        return None, None, annotation
    return old, None, annotation
