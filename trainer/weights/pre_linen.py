# SPDX-License-Identifier: Apache-2.0
"""Converts the module names of `flax.nn`, the predecessor of Linen.

It numbered the submodules of all classes together, Linen numbers each class by itself.
"""

from __future__ import annotations

import re

from trainer.weights.leaves import Weights

_NUMBERED = re.compile(r'(?P<name>.+)_(?P<number>\d+)')


def convert(weights: Weights) -> Weights:
    """Returns the weights under the names of Linen: 'Dense_1' after 'Conv_0' becomes 'Dense_0'."""
    # From all collections together: batch statistics have only some of the modules, and numbered by
    # themselves they would not match the parameters.
    modules = {tuple(path.split('/')[1:-1]) for path in weights}
    names = _renumber({parts[:i] for parts in modules for i in range(1, len(parts) + 1)})
    return {_rename(path, names): leaf for path, leaf in weights.items()}


def _renumber(modules: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Returns the new name of each numbered module, by its old path."""
    names: dict[tuple[str, ...], str] = {}
    for parent in {module[:-1] for module in modules}:
        counts: dict[str, int] = {}
        children = [m for m in modules if m[:-1] == parent]
        # By number and not by name: 'Dense_10' comes after 'Conv_9'.
        for child in sorted(children, key=_sort_key):
            match = _NUMBERED.fullmatch(child[-1])
            if match is None:
                continue
            number = counts.get(match['name'], 0)
            names[child] = f'{match["name"]}_{number}'
            counts[match['name']] = number + 1
    return names


def _sort_key(module: tuple[str, ...]) -> tuple[int, str]:
    match = _NUMBERED.fullmatch(module[-1])
    return (int(match['number']) if match else -1, module[-1])


def _rename(path: str, names: dict[tuple[str, ...], str]) -> str:
    collection, *parts = path.split('/')
    if not parts:  # A count of the optimizer, which belongs to no module.
        return path
    old = [tuple(parts[: i + 1]) for i in range(len(parts) - 1)]
    return '/'.join([collection, *(names.get(module, module[-1]) for module in old), parts[-1]])
