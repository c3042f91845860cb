# SPDX-License-Identifier: Apache-2.0
"""Command-line overrides: `--config.a.b=value`, checked against the config before anything runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from trainer.config import diff, schema, suggest, targets, values
from trainer.config.errors import UserError
from trainer.config.loading import plain

_KEY = re.compile(r'([^.\[\]]+)|\[(-?\d+)\]')
Keys = list[str | int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """One assignment, as it was applied.

    Attributes:
        path: 'optimizer.learning_rate'.
        place: where the value stands: `path`, or the object whose target `path` changes.
        text: what stood after '='.
        old: the value before, None if there was none.
        new: the value after.
        notes: lines to print.
    """

    path: str
    place: str
    text: str
    old: Any
    new: Any
    notes: tuple[str, ...] = ()


def parse_argv(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """Splits a command line into (--config, assignments, everything else).

    Both `--config.a=1` and `--config.a 1` are understood.

    Raises:
        UserError: if a value is missing.
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
            if value.startswith('--'):
                raise UserError(f'{word} needs a value: {word}=...')
        if name == '-config':
            spec = value
        else:
            assignments.append((name.removeprefix('-config.'), value))
    return spec, assignments, rest


def apply(
    config: ml_collections.ConfigDict, assignments: Sequence[tuple[str, str]]
) -> tuple[Override, ...]:
    """Changes the config in place.

    Raises:
        UserError: for a path that does not exist or a value of the wrong type.
    """
    with config.unlocked(), config.ignore_type():
        return tuple(_assign(config, path, text) for path, text in assignments)


def parse_path(path: str) -> Keys:
    """Returns ['data', 'transforms', 1, 'size'] for 'data.transforms[1].size'."""
    keys: Keys = [int(m[2]) if m[2] else m[1] for m in _KEY.finditer(path)]
    if not keys or _join(keys) != path:
        raise UserError(f'--config.{path}: not a path such as a.b or a.b[1].c')
    return keys


def _assign(config: ml_collections.ConfigDict, path: str, text: str) -> Override:
    keys = parse_path(path)
    old = _lookup(config, keys)
    like = _default_flag(config, keys) if old is None else old
    new = values.parse(text, like, schema.type_at(keys), f'config.{path}')
    notes: list[str] = []
    if keys[-1] == 'target' and len(keys) > 1 and isinstance(new, str):
        keys, new, old = keys[:-1], {'target': new}, plain(_get(config, keys[:-1]))
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        new = _merge(old, new, f'config.{_join(keys)}', notes)
    _store(config, keys, new)
    return Override(path=path, place=_join(keys), text=text, old=old, new=new, notes=tuple(notes))


def _merge(old: Mapping[str, Any], new: Mapping[str, Any], path: str, notes: list[str]) -> Any:
    """Returns `old` updated by `new` at every depth; a new target keeps what it accepts."""
    if 'ref' in new or 'ref' in old:
        # A reference has no other keys: it replaces an object, and is replaced by one.
        return dict(new)
    kept = dict(old)
    if 'target' in new and 'target' in old and new['target'] != old['target']:
        section = schema.section_at(parse_path(path.removeprefix('config.')))
        ours = schema.fields(section) if section is not None else {}
        fits = targets.accepted(new['target'], kept, path) | set(ours)
        kept = {key: value for key, value in kept.items() if key in fits}
        dropped = [key for key in old if key not in kept and key != 'target']
        notes.extend(f'{path}.{key} dropped: {new["target"]} does not take it' for key in dropped)
    for key, value in new.items():
        before = kept.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            kept[key] = _merge(before, value, f'{path}.{key}', notes)
            continue
        inner = schema.type_at(parse_path(f'{path}.{key}'.removeprefix('config.')))
        # A merged key is held to the same types as one set by its own path.
        kept[key] = values.parse(_text(value), before, inner, f'{path}.{key}')
    return kept


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _lookup(config: Any, keys: Keys) -> Any:
    """Returns the value at a path, None if it may be set but is not.

    Indices from the end become those from the start, in place.

    Raises:
        UserError: if nothing reads that path.
    """
    node = plain(config)
    for depth, key in enumerate(keys):
        if isinstance(node, (tuple, list)) and isinstance(key, int):
            if not -len(node) <= key < len(node):
                raise UserError(
                    f'config.{_join(keys[: depth + 1])}: there are {len(node)} elements'
                )
            keys[depth] = key % len(node)
            node = node[key]
        elif isinstance(node, Mapping) and key in node:
            node = node[key]
        elif _may_be_set(node, keys, depth):
            return None
        else:
            raise UserError(_unknown(config, keys, depth))
    return node


def _may_be_set(node: Any, keys: Keys, depth: int) -> bool:
    """Whether a key that the file leaves out exists: a fixed key, or an argument of a target."""
    if schema.type_at(keys) is not None:
        # A new evaluation begins with its data; any other key of an unknown one is a typo.
        return depth > 1 or len(keys) == 1 or keys[0] != 'evals' or keys[2:3] == ['data']
    is_object = isinstance(node, Mapping) and 'target' in node
    if not is_object or depth != len(keys) - 1 or not isinstance(keys[depth], str):
        return False
    where = f'config.{_join(keys[:depth])}'
    key = str(keys[depth])
    return key == 'args' or key in targets.accepted(node['target'], {key: None}, where)


def _default_flag(config: Any, keys: Keys) -> bool | None:
    """Returns the signature's default of an argument that the file leaves out, if it is a bool."""
    parent = _get(config, keys[:-1]) if schema.type_at(keys) is None else None
    if not isinstance(parent, Mapping | ml_collections.ConfigDict) or 'target' not in parent:
        return None
    known, _ = targets.arguments(targets.resolve(parent['target'], f'config.{_join(keys)}'))
    default = known[str(keys[-1])].default if keys[-1] in known else None
    return default if isinstance(default, bool) else None


def _unknown(config: Any, keys: Keys, depth: int) -> str:
    """The message for a path that nothing reads, with the one that was probably meant."""
    whole = plain(config)
    more = [f'config.{path}' for path, _, _ in schema.defaults(whole)]
    wrong = f'config.{_join(keys[: depth + 1])}'
    path = f'config.{_join(keys)}'
    parent = _get(whole, keys[:depth])
    if isinstance(parent, Mapping) and 'target' in parent:
        known, _ = targets.arguments(targets.resolve(parent['target'], wrong))
        more += [
            f'config.{_join(keys[:depth])}.{name}'
            for name in known
            if name not in targets.FRAMEWORK_SUPPLIED
        ]
        close = suggest.nearest(str(keys[depth]), [*known, *parent], cutoff=0.75)
        if close:
            return _did_you_mean(path, _replaced(keys, depth, close))
    elif isinstance(parent, Mapping):
        # One wrong word on the way: mend that word and keep the rest.
        known_here = [p.split('.')[depth + 1] for p in more if p.count('.') > depth]
        close = suggest.nearest(str(keys[depth]), [*parent, *known_here], cutoff=0.6)
        if close and depth < len(keys) - 1 and _exists(config, keys, depth, close):
            return _did_you_mean(path, _replaced(keys, depth, close))
    found = suggest.nearest_path(path, [*suggest.paths(whole, 'config'), *more])
    return _did_you_mean(path, found)


def _exists(config: Any, keys: Keys, depth: int, word: str) -> bool:
    if word == keys[depth]:
        return False
    try:
        _lookup(config, [*keys[:depth], word, *keys[depth + 1 :]])
    except UserError:
        return False
    return True


def _replaced(keys: Keys, depth: int, word: str) -> str:
    return f'config.{_join([*keys[:depth], word, *keys[depth + 1 :]])}'


def _did_you_mean(path: str, found: str | None) -> str:
    hint = f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'
    return f'{path}: there is no such key. {hint}'


def _get(config: Any, keys: Keys) -> Any:
    for key in keys:
        config = config[key]
    return config


def _store(config: ml_collections.ConfigDict, keys: Keys, value: Any) -> None:
    """Sets a value; tuples and plain dicts on the way are replaced by changed copies."""
    key, rest = keys[0], keys[1:]
    if not rest:
        if isinstance(value, Mapping) and isinstance(config.get(key), ml_collections.ConfigDict):
            _update(config[key], value)
        else:
            config[key] = value
    elif isinstance(config.get(key), ml_collections.ConfigDict):
        _store(config[key], rest, value)
    elif key in config and config[key] is not None:
        config[key] = _changed(config[key], rest, value)
    else:
        config[key] = _changed({}, rest, value)


def _update(config: ml_collections.ConfigDict, value: Mapping[str, Any]) -> None:
    """Makes a config equal to `value`; what does not change keeps its references."""
    for key in [key for key in config if key not in value]:
        del config[key]
    for key, new in value.items():
        if key not in config or diff.diff(plain(config[key]), new):
            _store(config, [key], new)


def _changed(node: Any, keys: Keys, value: Any) -> Any:
    """Returns a copy of plain containers with one place changed."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, (tuple, list)):
        items = list(node)
        items[int(key)] = _changed(items[int(key)], rest, value)
        return type(node)(items)
    return {**node, key: _changed(node.get(key, {}), rest, value)}


def _join(keys: Sequence[str | int]) -> str:
    text = ''.join(f'[{key}]' if isinstance(key, int) else f'.{key}' for key in keys)
    return text.removeprefix('.')
