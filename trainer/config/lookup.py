# SPDX-License-Identifier: Apache-2.0
"""What stands at a path of a config, whether it may be set, and what a wrong one probably meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from trainer.config import paths, schema, suggest, targets
from trainer.config.errors import UserError
from trainer.config.loading import plain

# A new evaluation, or group, begins with this key; any other key of an unknown one is a typo.
_FIRST_KEYS: dict[tuple[str | int, ...], str] = {
    ('evals',): 'data',
    ('optimizer', 'groups'): 'params',
}


def value_at(config: Any, keys: paths.Keys) -> Any:
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
                    f'config.{paths.join(keys[: depth + 1])}: there are {len(node)} elements'
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


def default_flag(config: Any, keys: paths.Keys) -> bool | None:
    """Returns the signature's default of an argument that the file leaves out, if it is a bool."""
    parameter = _parameter(config, keys)
    default = None if parameter is None else parameter.default
    return default if isinstance(default, bool) else None


def takes_none(config: Any, keys: paths.Keys) -> bool:
    """Whether a path is an argument that may be None: by its default, or by its annotation."""
    parameter = _parameter(config, keys)
    if parameter is None:
        return False
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else str(annotation)
    return parameter.default is None or bool(re.search(r'\b(None|NoneType|Optional|Any)\b', text))


def _parameter(config: Any, keys: paths.Keys) -> inspect.Parameter | None:
    """Returns the parameter of a target that a path sets; None for a fixed key, or no argument."""
    parent = paths.get(config, keys[:-1]) if schema.type_at(keys) is None else None
    if not isinstance(parent, Mapping | ml_collections.ConfigDict) or 'target' not in parent:
        return None
    known, _ = targets.arguments(targets.resolve(parent['target'], f'config.{paths.join(keys)}'))
    return known.get(str(keys[-1]))


def placeholder_type(config: Any, keys: paths.Keys) -> type | None:
    """Returns the type that the file declares for a value yet to come, None if it declares none."""
    if not paths.holds(config, keys):
        return None
    parent = paths.get(config, keys[:-1])
    if not isinstance(parent, ml_collections.ConfigDict):
        return None
    value = dict(parent.items(preserve_field_references=True))[keys[-1]]
    is_empty = isinstance(value, ml_collections.FieldReference) and value.empty()
    return value.get_type() if is_empty and value.get_type() is not type(None) else None


def _may_be_set(node: Any, keys: paths.Keys, depth: int) -> bool:
    """Whether a key that the file leaves out exists: a fixed key, or an argument of a target."""
    if schema.type_at(keys) is not None:
        first = _FIRST_KEYS.get(tuple(keys[:depth]))
        return first is None or keys[depth + 1 : depth + 2] in ([], [first])
    is_object = isinstance(node, Mapping) and 'target' in node
    if not is_object or depth != len(keys) - 1 or not isinstance(keys[depth], str):
        return False
    where = f'config.{paths.join(keys[:depth])}'
    key = str(keys[depth])
    return key == 'args' or key in targets.accepted(node['target'], {key: None}, where)


def _unknown(config: Any, keys: paths.Keys, depth: int) -> str:
    """The message for a path that nothing reads, with the one that was probably meant."""
    whole = plain(config)
    path, word = f'config.{paths.join(keys)}', str(keys[depth])
    unset = [*schema.defaults(whole), *schema.optional(whole)]
    known = [*suggest.paths(whole, 'config'), *(f'config.{p}' for p, _, _ in unset)]
    parent = paths.get(whole, keys[:depth])
    if isinstance(parent, Mapping) and 'target' in parent:
        return _unknown_argument(parent, keys, depth, known)
    if isinstance(parent, Mapping) and depth < len(keys) - 1:
        # One wrong word on the way: mend that word and keep the rest.
        siblings = [p.split('.')[depth] for p, _, _ in unset if p.count('.') >= depth]
        close = suggest.nearest(word, [*parent, *siblings])
        if close and _exists(config, keys, depth, close):
            return _did_you_mean(path, _replaced(keys, depth, close))
    return _did_you_mean(path, suggest.nearest_path(path, known))


def _unknown_argument(
    node: Mapping[str, Any], keys: paths.Keys, depth: int, known: Sequence[str]
) -> str:
    path, place = f'config.{paths.join(keys)}', f'config.{paths.join(keys[:depth])}'
    target = targets.resolve(node['target'], f'{place}.target')
    names = [n for n in targets.arguments(target)[0] if n not in targets.FRAMEWORK_SUPPLIED]
    close = suggest.nearest(str(keys[depth]), [*names, *node], cutoff=0.75)
    if close:
        return _did_you_mean(path, _replaced(keys, depth, close))
    found = suggest.nearest_path(path, [*known, *(f'{place}.{name}' for name in names)])
    if found is None or path.startswith(f'{found}.'):
        return f'{path}: {node["target"]} takes no such argument. It takes: {", ".join(names)}.'
    return _did_you_mean(path, found)


def _exists(config: Any, keys: paths.Keys, depth: int, word: str) -> bool:
    if word == keys[depth]:
        return False
    mended = [*keys[:depth], word, *keys[depth + 1 :]]
    try:
        value = value_at(config, mended)
    except UserError:
        return False
    # A mapping (`evals`, `hooks`, `mesh`) takes any name: that a new one fits proves nothing.
    fixed_or_argument = schema.type_at(mended) is None or schema.section_at(mended[:-1])
    return value is not None or bool(fixed_or_argument)


def _replaced(keys: paths.Keys, depth: int, word: str) -> str:
    return f'config.{paths.join([*keys[:depth], word, *keys[depth + 1 :]])}'


def _did_you_mean(path: str, found: str | None) -> str:
    hint = f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'
    return f'{path}: there is no such key. {hint}'
