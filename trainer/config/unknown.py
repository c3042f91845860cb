# SPDX-License-Identifier: Apache-2.0
"""What is said of a path that nothing reads: the one that was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config import objects, paths, reach, schema, suggest, synonyms, targets
from trainer.config.errors import shortened

# The path of an override may be long; a message is not.
_LONGEST = 200


def message(whole: Mapping[str, Any], keys: paths.Keys, depth: int) -> str:
    """Returns the message for a path that nothing reads.

    Args:
        whole: the plain config.
        keys: the path.
        depth: which of its keys is the first that is wrong.
    """
    path = f'config.{paths.join(keys)}'
    parent = paths.get(whole, keys[:depth])
    if reach.holds(parent, keys[depth]):  # In a dict that was given, and that is no suggestion.
        parent = {key: value for key, value in parent.items() if key != keys[depth]}
        whole = paths.changed(whole, keys[:depth], parent)
    is_object = isinstance(parent, Mapping) and 'target' in parent
    siblings = [name for name in reach.names(parent, keys[:depth]) if name != keys[depth]]
    close = suggest.nearest(str(keys[depth]), siblings, cutoff=0.75)
    fixed, complete = reach.repaired(whole, keys) if close else ([], False)
    if complete and fixed[depth] == close:
        return _no_key(path, _did_you_mean(f'config.{paths.join(fixed)}'))
    place = f'config.{paths.join(keys[:depth])}'.removesuffix('.')
    if depth == len(keys) - 1 and (mine := synonyms.among(str(keys[depth]), siblings)):
        return _no_key(path, _did_you_mean(f'{place}.{mine}'))
    if hint := synonyms.hint(str(keys[-1]), whole, _may_have):
        return _no_key(path, hint)
    known = _known(whole)
    if is_object:
        return _unknown_argument(parent, keys, depth, known)
    fixed, complete = reach.repaired(whole, keys)
    if complete:
        return _no_key(path, _did_you_mean(f'config.{paths.join(fixed)}'))
    last = [p for p in known if p.rpartition('.')[2] == keys[-1]]
    if not last and len(fixed) > depth:  # Some wrong names were replaced, not all.
        return _no_key(path, _did_you_mean(f'config.{paths.join(fixed)}'))
    found = suggest.nearest_path(path, last or known)
    if found == place and siblings:  # Only the section is right.
        return _no_key(path, f'{place} has: {", ".join(siblings)}.')
    return _no_key(path, _did_you_mean(found))


def _known(whole: Mapping[str, Any]) -> list[str]:
    """Returns every path of a config, with those that may be set."""
    unset = [*schema.defaults(whole), *schema.optional(whole)]
    return [*suggest.paths(whole, 'config'), *(f'config.{p}' for p, _, _ in unset)]


def _may_have(whole: Mapping[str, Any], path: str) -> bool:
    """Whether a path of a config is held, or may be set."""
    keys, node = paths.parse(path), whole
    for depth, key in enumerate(keys):
        if not reach.holds(node, key):
            return reach.may_be_set(node, keys, depth)
        node = node[key]  # type: ignore[index]
    return True


def _unknown_argument(
    node: Mapping[str, Any], keys: paths.Keys, depth: int, known: list[str]
) -> str:
    path, place = f'config.{paths.join(keys)}', f'config.{paths.join(keys[:depth])}'
    target = objects.resolve(node['target'], f'{place}.target')
    names = targets.told(targets.arguments(target)[0])
    found = suggest.nearest_path(path, [*known, *(f'{place}.{name}' for name in names)])
    if found is None or path.startswith(f'{found}.'):
        path = shortened(path, _LONGEST)
        takes = shortened(', '.join(names), 300)
        return f'{path}: {node["target"]} takes no such argument. It takes: {takes}.'
    return _no_key(path, _did_you_mean(found))


def _did_you_mean(found: str | None) -> str:
    return f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'


def _no_key(path: str, hint: str) -> str:
    return f'{shortened(path, _LONGEST)}: there is no such key. {hint}'
