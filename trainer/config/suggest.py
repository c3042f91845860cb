# SPDX-License-Identifier: Apache-2.0
"""Suggestions for misspelled key paths and names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Names of at most so many characters resemble too many others.
_SHORT = 3


def paths(node: Any, prefix: str) -> Iterator[str]:
    """Yields every path of a plain config: 'config.model', 'config.data.transforms[0].key', ..."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f'{prefix}.{key}'
            yield from paths(value, f'{prefix}.{key}')
    elif isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            yield f'{prefix}[{index}]'
            yield from paths(value, f'{prefix}[{index}]')


def nearest_name(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the candidate most like `word`, or None if none is like it."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_path(path: str, candidates: Iterable[str]) -> str | None:
    """Returns the path most like `path` of those that end in the same key, else in one like it.

    Failing that, the longest that `path` only goes too far beyond.
    """
    by_last: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(candidates):
        by_last.setdefault(candidate.rpartition('.')[2], []).append(candidate)
    last = path.rpartition('.')[2]
    alike = by_last.get(last) or [
        candidate
        for word in (
            difflib.get_close_matches(last, by_last, cutoff=0.7) if len(last) > _SHORT else ()
        )
        for candidate in by_last[word]
    ]
    beginnings = [c for group in by_last.values() for c in group if path.startswith(f'{c}.')]
    return nearest_name(path, alike, cutoff=0.0) or max(beginnings, key=len, default=None)


def did_you_mean(path: str, config: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """Returns 'Did you mean config.x.y?', or where to look; the config may hold the wrong path."""
    known = [p for p in (*paths(config, 'config'), *more) if p != path]
    return question(nearest_path(path, known))


def question(found: str | None) -> str:
    """Returns 'Did you mean config.x.y?', or where to look if nothing was found."""
    return f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'
