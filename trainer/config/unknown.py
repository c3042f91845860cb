# SPDX-License-Identifier: Apache-2.0
"""Messages for paths that nothing reads: which one was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config import objects, paths, reach, schema, signatures, suggest, synonyms, targets
from trainer.config.errors import shorten

# The path of an override may be long; a message is not.
_LONGEST = 200

# Flags of the command line, unless they are in a section: `checkpoint.mode` is something else.
_ONLY_FLAGS = ('mode',)

_HOOK = """'{"target": "package.module:Class"}', or "ref" for a function"""


def message(whole: Mapping[str, Any], keys: paths.Keys, depth: int) -> str:
    """Returns what to print of a path that nothing reads.

    Args:
        whole: the plain config.
        keys: the path.
        depth: which of its keys is the first that is wrong.
    """
    path = f'config.{paths.join(keys)}'
    parent = paths.get(whole, keys[:depth])
    if reach.contains(parent, keys[depth]):  # In a dict that was given, and that is no suggestion.
        parent = {key: value for key, value in parent.items() if key != keys[depth]}
        whole = paths.with_value(whole, keys[:depth], parent)
    is_object = isinstance(parent, Mapping) and 'target' in parent
    siblings = [name for name in reach.possible_names(parent, keys[:depth]) if name != keys[depth]]
    place = f'config.{paths.join(keys[:depth])}'.removesuffix('.')
    # Before the names that look alike: `steps` means the length of the run, and not `step`.
    if depth == len(keys) - 1 and (hint := _synonym_hint(whole, keys, siblings)):
        return _unknown_key_text(path, hint)
    close = suggest.nearest_name(str(keys[depth]), siblings, cutoff=0.75)
    fixed, complete = reach.repair(whole, keys) if close else ([], False)
    if complete and fixed[depth] == close:
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(fixed)}'))
    if hint := _hint(whole, keys):
        return _unknown_key_text(path, hint)
    known = _known_paths(whole)
    if is_object:
        return _unknown_argument_text(parent, keys, depth, known)
    last = [p for p in known if p.rpartition('.')[2] == keys[-1]]
    if keys[0] == 'hooks' and depth <= 1 and len(keys) > 2:
        place = f'config.{paths.join(keys[:2])}'
        return _unknown_key_text(path, f'A new hook is written whole: --{place}={_HOOK}.')
    fixed, complete = reach.repair(whole, keys)
    # A key of that very name, somewhere else, is more likely than one that looks alike.
    if complete and not (last and depth == 0 and len(keys) == 1):
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(fixed)}'))
    if not last and len(fixed) > depth:  # Some wrong names were replaced, not all.
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(fixed)}'))
    found = suggest.nearest_path(path, last or known)
    if found == place and siblings:  # Only the section is right.
        return _unknown_key_text(path, f'{place} has: {", ".join(siblings)}.')
    return _unknown_key_text(path, suggest.question(found))


def _synonym_hint(whole: Mapping[str, Any], keys: paths.Keys, siblings: list[str]) -> str | None:
    """Returns what leads from a last key that is a word of another framework to ours, or None."""
    word, place = str(keys[-1]), f'config.{paths.join(keys[:-1])}'.removesuffix('.')
    if mine := synonyms.find_synonym(word, siblings):
        return suggest.question(f'{place}.{mine}')
    if not synonyms.find_leads(word):
        return None
    inside = [
        p for p in _known_paths(whole) if p.startswith(f'{place}.') and p.endswith(f'.{word}')
    ]
    if len(keys) > 1 and len(inside) == 1:
        return suggest.question(inside[0])
    beginning = [name for name in siblings if name.startswith(f'{word}_')]
    if beginning and schema.section_at(keys[:-1]) is None:
        return suggest.question(f'{place}.{beginning[0]}')
    return _hint(whole, keys)


def _hint(whole: Mapping[str, Any], keys: paths.Keys) -> str | None:
    if len(keys) > 1 and keys[-1] in _ONLY_FLAGS:
        return None
    return synonyms.hint(str(keys[-1]), whole, _may_exist)


def _known_paths(whole: Mapping[str, Any]) -> list[str]:
    """Returns every path of a config, with those that may be set."""
    unset = [*schema.defaults(whole), *schema.optional_fields(whole)]
    return [*suggest.paths(whole, 'config'), *(f'config.{p}' for p, _, _ in unset)]


def _may_exist(whole: Mapping[str, Any], path: str) -> bool:
    """Whether a path of a config is held, or may be set."""
    keys, node = paths.parse(path), whole
    for depth, key in enumerate(keys):
        if not reach.contains(node, key):
            return reach.may_be_set(node, keys, depth)
        node = node[key]  # type: ignore[index]
    return True


def _unknown_argument_text(
    node: Mapping[str, Any], keys: paths.Keys, depth: int, known: list[str]
) -> str:
    path, place = f'config.{paths.join(keys)}', f'config.{paths.join(keys[:depth])}'
    target = objects.resolve(node['target'], f'{place}.target')
    names = targets.visible_arguments(signatures.arguments(target)[0])
    found = suggest.nearest_path(path, [*known, *(f'{place}.{name}' for name in names)])
    if found is None or path.startswith(f'{found}.'):
        path = shorten(path, _LONGEST)
        takes = shorten(', '.join(names), 300)
        return f'{path}: {node["target"]} takes no such argument. It takes: {takes}.'
    return _unknown_key_text(path, suggest.question(found))


def _unknown_key_text(path: str, hint: str) -> str:
    return f'{shorten(path, _LONGEST)}: there is no such key. {hint}'
