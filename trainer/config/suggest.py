# SPDX-License-Identifier: Apache-2.0
"""Which path was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


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


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the candidate most like `word`, or None if none is like it."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=1, cutoff=cutoff)
    return found[0] if found else None


def nearest_path(path: str, candidates: Iterable[str]) -> str | None:
    """Returns the path most like `path`; one that ends in the same key is preferred."""
    candidates = list(dict.fromkeys(candidates))
    last = path.rpartition('.')[2]
    same_key = [c for c in candidates if c.rpartition('.')[2] == last]
    return nearest(path, same_key, cutoff=0.0) or nearest(path, candidates)


def did_you_mean(path: str, config: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """Returns 'Did you mean config.x.y?', or where to look."""
    found = nearest_path(path, [*paths(config, 'config'), *more])
    return f'Did you mean {found}?' if found else 'See --helpconfig for all keys.'
