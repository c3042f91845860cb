# SPDX-License-Identifier: Apache-2.0
"""Messages for unknown key paths, with a suggestion of the path that was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config import objects, paths, reach, schema, signatures, suggest, synonyms, targets
from trainer.config.errors import shorten

# The path of an override may be long; a message should not be.
_MAX_PATH_CHARACTERS = 200

# At the top level these are flags (`--mode`); within a section they mean a key of the section,
# such as `checkpoint.best.mode`.
_ONLY_FLAGS = ('mode',)

_HOOK = """'{"target": "package.module:Class"}', or "ref" for a function"""


def message(config: Mapping[str, Any], keys: paths.Keys, depth: int) -> str:
    """Returns the message for an unknown key path.

    The hints are tried from the most to the least certain: a name that another framework uses, a
    close misspelling, a new hook, a repaired path, and the most similar of all paths.

    Args:
        config: the plain config.
        keys: the key path, as names and indices.
        depth: index of its first unknown key.
    """
    path = f'config.{paths.join(keys)}'
    parent = paths.get(config, keys[:depth])
    # The config may contain the unknown key already, from a dict that the user set. It must not be
    # suggested back.
    if reach.contains(parent, keys[depth]):
        parent = {key: value for key, value in parent.items() if key != keys[depth]}
        config = paths.with_value(config, keys[:depth], parent)
    is_object = isinstance(parent, Mapping) and 'target' in parent
    siblings = [name for name in reach.possible_names(parent, keys[:depth]) if name != keys[depth]]
    parent_path = f'config.{paths.join(keys[:depth])}'.removesuffix('.')
    # Synonyms come before similar names: `steps` means the length of the run, not the key `step`.
    if depth == len(keys) - 1 and (hint := _synonym_hint(config, keys, siblings)):
        return _unknown_key_text(path, hint)
    close = suggest.nearest_name(str(keys[depth]), siblings, cutoff=0.75)
    repaired, is_complete = reach.repair(config, keys) if close else ([], False)
    if is_complete and repaired[depth] == close:
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(repaired)}'))
    if hint := _synonym_target(config, keys):
        return _unknown_key_text(path, hint)
    known = _known_paths(config)
    if is_object:
        return _unknown_argument_text(parent, keys, depth, known)
    same_name = [p for p in known if p.rpartition('.')[2] == keys[-1]]
    if keys[0] == 'hooks' and depth <= 1 and len(keys) > 2:
        hook = f'config.{paths.join(keys[:2])}'
        return _unknown_key_text(path, f'A new hook is set as a whole: --{hook}={_HOOK}.')
    repaired, is_complete = reach.repair(config, keys)
    # For a single key, the same name in another section is likelier than a similar name here.
    if is_complete and not (same_name and depth == 0 and len(keys) == 1):
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(repaired)}'))
    # A partial repair still gets further than the path that was given.
    if not same_name and len(repaired) > depth:
        return _unknown_key_text(path, suggest.question(f'config.{paths.join(repaired)}'))
    nearest = suggest.nearest_path(path, same_name or known)
    # "Did you mean" the section that was named would not help; its keys do.
    if nearest == parent_path and siblings:
        return _unknown_key_text(path, f'{parent_path} has: {", ".join(siblings)}.')
    return _unknown_key_text(path, suggest.question(nearest))


def _synonym_hint(config: Mapping[str, Any], keys: paths.Keys, siblings: list[str]) -> str | None:
    """Returns a hint if the last key is a name that another framework uses, else None."""
    word, parent_path = str(keys[-1]), f'config.{paths.join(keys[:-1])}'.removesuffix('.')
    # A key right here is likelier than the usual one: of an argument `lr`, the `learning_rate` of
    # the same object rather than that of `config.optimizer`.
    if name := synonyms.find_synonym(word, siblings):
        return suggest.question(f'{parent_path}.{name}')
    if not synonyms.find_leads(word):
        return None
    inside = [
        path
        for path in _known_paths(config)
        if path.startswith(f'{parent_path}.') and path.endswith(f'.{word}')
    ]
    if len(keys) > 1 and len(inside) == 1:
        return suggest.question(inside[0])
    longer = [name for name in siblings if name.startswith(f'{word}_')]
    if longer and schema.section_at(keys[:-1]) is None:
        return suggest.question(f'{parent_path}.{longer[0]}')
    return _synonym_target(config, keys)


def _synonym_target(config: Mapping[str, Any], keys: paths.Keys) -> str | None:
    if len(keys) > 1 and keys[-1] in _ONLY_FLAGS:
        return None
    return synonyms.hint(str(keys[-1]), config, _may_exist)


def _known_paths(config: Mapping[str, Any]) -> list[str]:
    """Returns every path that a config contains or may set."""
    unset = [*schema.defaults(config), *schema.optional_fields(config)]
    return [*suggest.paths(config, 'config'), *(f'config.{p}' for p, _, _ in unset)]


def _may_exist(config: Mapping[str, Any], path: str) -> bool:
    """Whether a config contains a path or may set it."""
    keys: Any = paths.parse(path)
    node: Any = config
    for depth, key in enumerate(keys):
        if not reach.contains(node, key):
            return reach.may_be_set(node, keys, depth)
        node = node[key]
    return True


def _unknown_argument_text(
    node: Mapping[str, Any], keys: paths.Keys, depth: int, known: list[str]
) -> str:
    path, node_path = f'config.{paths.join(keys)}', f'config.{paths.join(keys[:depth])}'
    target = objects.resolve(node['target'], f'{node_path}.target')
    names = targets.visible_arguments(signatures.arguments(target)[0])
    nearest = suggest.nearest_path(path, [*known, *(f'{node_path}.{name}' for name in names)])
    # Nothing similar exists, or only the object itself: then the list of its arguments helps.
    if nearest is None or path.startswith(f'{nearest}.'):
        path = shorten(path, _MAX_PATH_CHARACTERS)
        arguments = shorten(', '.join(names), 300)
        return f'{path}: {node["target"]} takes no such argument. It takes: {arguments}.'
    return _unknown_key_text(path, suggest.question(nearest))


def _unknown_key_text(path: str, hint: str) -> str:
    return f'Unknown key {shorten(path, _MAX_PATH_CHARACTERS)}. {hint}'
