# SPDX-License-Identifier: Apache-2.0
"""Suggests names and key paths that are similar to a misspelled one."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Names of at most this many characters are similar to too many others.
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
    """Returns the candidate that is most similar to `word`, None if none is similar.

    Args:
        word: the misspelled name.
        candidates: the valid names.
        cutoff: least similarity, from 0 (anything) to 1 (equal).
    """
    # Without repeats: difflib compares every candidate, and configs repeat names a lot.
    close = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=3, cutoff=cutoff)

    def similarity(candidate: str) -> tuple[float, int]:
        # Of equally similar ones the one that begins alike: 'cnn' and not 'gcn' for 'cn'.
        ratio = difflib.SequenceMatcher(None, candidate, word).ratio()
        same = (a == b for a, b in zip(candidate, word, strict=False))
        return ratio, sum(itertools.takewhile(bool, same))

    return max(close, key=similarity, default=None)


def nearest_path(path: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that is most similar to a path, None if there is none.

    Candidates that end in the same key come first, then those that end in a similar one. Failing
    both, the longest candidate that is the beginning of the path.
    """
    by_last_key: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(candidates):
        by_last_key.setdefault(candidate.rpartition('.')[2], []).append(candidate)
    last_key = path.rpartition('.')[2]
    # Comparing last keys, of which there are few, keeps this fast for large configs.
    similar = by_last_key.get(last_key) or [
        candidate
        for word in (
            difflib.get_close_matches(last_key, by_last_key, cutoff=0.7)
            if len(last_key) > _SHORT
            else ()
        )
        for candidate in by_last_key[word]
    ]
    beginnings = [c for group in by_last_key.values() for c in group if path.startswith(f'{c}.')]
    # Their last keys match already, so the rest of the path only decides between them: no cutoff.
    return nearest_name(path, similar, cutoff=0.0) or max(beginnings, key=len, default=None)


def did_you_mean(path: str, config: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """Returns 'Did you mean config.x.y?', or where to look if nothing is similar.

    Args:
        path: the key path that the config does not have.
        config: the plain config.
        more: valid paths that the config does not contain.
    """
    # The config may contain the unknown path itself.
    known = [p for p in (*paths(config, 'config'), *more) if p != path]
    return question(nearest_path(path, known))


def question(suggestion: str | None) -> str:
    """Returns 'Did you mean config.x.y?', or where to look if there is no suggestion."""
    return f'Did you mean {suggestion}?' if suggestion else 'See --helpconfig for all keys.'
