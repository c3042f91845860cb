# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `flax.nn`, which numbered sub-modules of all classes together."""

from __future__ import annotations

import re

from trainer.weights.leaves import Weights

_NUMBERED = re.compile(r'(?P<name>.+)_(?P<number>\d+)')


def convert(weights: Weights) -> Weights:
    """Returns the weights under the names of Linen: 'Dense_1' after 'Conv_0' is its 'Dense_0'.

    Every collection is renumbered by the names of all: batch statistics have gaps where a module
    has none.
    """
    places = {tuple(path.split('/')[1:-1]) for path in weights}
    names = _renumbered({parts[:i] for parts in places for i in range(1, len(parts) + 1)})
    return {_renamed(path, names): leaf for path, leaf in weights.items()}


def _renumbered(modules: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Returns the new name of each module, by its old path."""
    names: dict[tuple[str, ...], str] = {}
    for parent in {module[:-1] for module in modules}:
        counts: dict[str, int] = {}
        children = [m for m in modules if m[:-1] == parent]
        for child in sorted(children, key=_number):
            match = _NUMBERED.fullmatch(child[-1])
            if match is None:
                continue
            number = counts.get(match['name'], 0)
            names[child] = f'{match["name"]}_{number}'
            counts[match['name']] = number + 1
    return names


def _number(module: tuple[str, ...]) -> tuple[int, str]:
    match = _NUMBERED.fullmatch(module[-1])
    return (int(match['number']) if match else -1, module[-1])


def _renamed(path: str, names: dict[tuple[str, ...], str]) -> str:
    collection, *parts = path.split('/')
    if not parts:  # An optimizer's count, which is of no module.
        return path
    old = [tuple(parts[: i + 1]) for i in range(len(parts) - 1)]
    return '/'.join([collection, *(names.get(module, module[-1]) for module in old), parts[-1]])
