# SPDX-License-Identifier: Apache-2.0
"""Applies command-line overrides (`--config.a.b=value`), checked against the config."""

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
    """An override that was applied.

    Attributes:
        path: 'optimizer.learning_rate'.
        value_path: path of `new`: `path`, or the object whose target `path` sets.
        text: the text after '='.
        old: the value before, None if there was none.
        new: the value after.
        default_paths: paths that the file leaves out and that were set to their defaults.
        linked_values: new values at other paths that share a reference with this one, by path.
        notes: lines to print, such as about arguments that were dropped.
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
    """Splits a command line into the value of --config, the overrides, and all other words.

    An override is written as `--config.a=1` or `--config.a 1`.

    Returns:
        The value of --config (None if it is not given), (path, text) pairs, and the other words.

    Raises:
        UserError: if a value is missing, if '=' is a word, or if --config is given twice with
            different values.
    """
    if '=' in argv:
        raise UserError("There is a space before '='; write --flag=value, without spaces")
    spec: str | None = None
    assignments: list[tuple[str, str]] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition('=')
        # Like the flags of absl, these may have one dash or two.
        name = '-' + name.lstrip('-') if name.startswith('-') else name
        if name != '-config' and not name.startswith('-config.'):
            rest.append(word)
            continue
        if not equals:
            # At the end of the command line, '--' counts as a missing value below.
            value = next(words, '--')
        # A value may begin with one dash: `--config.a -1`.
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
    """Returns a Python value as the text of an override.

    Args:
        value: text, or anything else that a config can contain.
        path: its key path, for messages.

    Raises:
        UserError: for a value that a config cannot contain.
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
    """Returns a value with NumPy and JAX scalars as Python numbers, at every depth."""
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
    """Applies overrides to a config, in place.

    Args:
        config: the config.
        assignments: (path, text) pairs, applied in this order.

    Returns:
        What each override changed.

    Raises:
        UserError: for an unknown path or a value of the wrong type.
    """
    # `values` checks the types: ConfigDict's own check would reject a schedule in place of a
    # learning rate.
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
        new = paths.nest(new, f'config.{path}')  # A ConfigDict rejects keys with dots.
        literals.check(new, f'config.{path}', keys)
    given, notes = new, list[str]()
    # Another target changes its whole object: arguments that the new target lacks are dropped.
    if keys[-1] == 'target' and len(keys) > 1 and isinstance(new, str):
        keys, new, old = keys[:-1], {'target': new}, to_plain(paths.get(config, keys[:-1]))
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        new = _merge(old, new, keys, notes)
    before, value_path = to_plain(config), paths.join(keys)
    paths.store(config, keys, new)
    # After storing: which names are valid may depend on the target that the value has set.
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


def _linked_values(
    config: ml_collections.ConfigDict, before: Any, value_path: str
) -> dict[str, Any]:
    """Returns the values that an override has set at other paths, by path.

    Args:
        config: the config, after the override.
        before: the plain config before it.
        value_path: where the override has set its value.
    """
    references = dict(_references(config, ''))
    reference = references.get(value_path)
    # A path with the same reference is included even if its value is unchanged, because it comes
    # from this override now. A path with a computed reference appears in the difference.
    linked = {path: to_plain(ref) for path, ref in references.items() if ref is reference}
    linked.update({each.path: each.new for each in diff.diff(before, to_plain(config))})
    inside = (f'{value_path}.', f'{value_path}[')
    return {p: new for p, new in linked.items() if p != value_path and not p.startswith(inside)}


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
    """Sets a default object that a path leads into, so that the override changes only a part of it.

    `--config.data.loader.workers=4` keeps the default target of `config.data.loader`.

    Returns:
        The paths that were set.
    """
    for depth in range(1, len(keys) + 1):
        parent = keys[:depth]
        default = schema.default_object(parent)
        if default and not paths.contains(config, parent):
            paths.store(config, parent, default)
            return tuple(f'{paths.join(parent)}.{key}' for key in default)
    return ()


def _merge(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: paths.Keys, notes: list[str]
) -> Any:
    """Returns `old` updated by `new` at every depth.

    If `new` has another target, arguments that it does not take are dropped.

    Args:
        old: the dict until now.
        new: the dict of the override.
        keys: path of both.
        notes: gets a line for each dropped argument.
    """
    if not new or 'ref' in new or 'ref' in old:
        # An empty dict clears. A `ref` has no other keys, so there is nothing to merge with.
        return dict(new)
    path = f'config.{paths.join(keys)}'
    merged = dict(old)
    if 'target' in new and 'target' in old and new['target'] != old['target']:
        # Keys of the section, such as `optimizer.clip_norm`, do not go to the target.
        section = schema.section_at(keys)
        fixed = schema.fields(section) if section is not None else {}
        accepted = targets.accepted_keys(new['target'], merged, path) | set(fixed)
        merged = {key: value for key, value in merged.items() if key in accepted}
        dropped = [key for key in old if key not in (*merged, *new)]
        notes.extend(f'{path}.{key} dropped: {new["target"]} does not take it' for key in dropped)
    literals.check_names({**merged, **new}, path, keys)
    for key, value in new.items():
        before, inner_keys = merged.get(key), [*keys, key]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            merged[key] = _merge(before, value, inner_keys, notes)
            continue
        text, annotation = literals.to_text(value), values.no_annotation
        # A key in a dict must have the same type as one that is set by its own path.
        hint = schema.type_at(inner_keys)
        if hint is None:
            before, hint, annotation = _argument_type({**merged, **new}, key, before, text, keys)
        merged[key] = values.convert(value, text, before, hint, f'{path}.{key}', annotation)
    return merged


def _argument_type(
    node: Any, key: str | int, old: Any, text: str, keys: paths.Keys
) -> tuple[Any, Any, values.Annotation]:
    """Returns what determines the type of an argument's new value.

    Args:
        node: the object's dict.
        key: name of the argument.
        old: its value until now.
        text: the text of the new value.
        keys: path of the object.

    Returns:
        A value of the same type, a type, and a function that returns the annotation; the first two
        are None if they do not matter.
    """
    path = f'config.{paths.join(keys)}'
    # Deferred, because it imports the target, which most overrides do not need.
    annotation = functools.partial(lookup.annotation, node, key, path)
    if old is None:
        # An optimizer's argument that is annotated as int may be a duration in the config.
        is_steps = keys[:1] == ['optimizer'] and is_duration(text)
        return None, None if is_steps else lookup.argument_type(node, key, path), annotation
    if literals.literal(text) is None and lookup.takes_none(node, key, path):
        return None, None, annotation
    return old, None, annotation
