# SPDX-License-Identifier: Apache-2.0
"""Operations of `config.surgery` between layers with names and those of an `nn.scan`.

The first have arrays of their own, 'block_0/mlp/kernel' and so on; the second have one for all,
'blocks/mlp/kernel', with a first dimension of layers. What an optimizer holds goes with them.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from trainer.config.errors import UserError
from trainer.weights.leaves import HostLeaf, Leaf, Weights, host, place, replace_place
from trainer.weights.surgery import nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Makes one array of those of numbered layers.

    Attributes:
        pattern: regular expression with one group, the number; it may match a part of a path.
        replacement: of what it matches, such as 'blocks/'.
    """

    pattern: str = r'^block_(\d+)/'
    replacement: str = 'blocks/'

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the layers in a first dimension.

        Raises:
            UserError: if there are none, one is missing, or their shapes differ.
        """
        rest: Weights = {}
        layers: dict[str, dict[int, Leaf]] = {}
        for path, leaf in weights.items():
            match = _search(self, self.pattern, path)
            if match is None:
                rest[path] = leaf
                continue
            if match.re.groups != 1 or not match[1].isdecimal():
                raise UserError(f"config.surgery: {self}: one group is a layer's number")
            new = match.string[: match.start()] + self.replacement + match.string[match.end() :]
            layers.setdefault(replace_place(path, new), {})[int(match[1])] = leaf
        if not layers:
            raise nothing(self, weights)
        stacked = {path: self._stacked(path, numbered) for path, numbered in layers.items()}
        if twice := sorted(stacked.keys() & rest.keys()):
            raise UserError(f'config.surgery: {self}: there is a {twice[0]} already')
        return {**rest, **stacked}

    def _stacked(self, path: str, numbered: dict[int, Leaf]) -> Leaf:
        if sorted(numbered) != list(range(len(numbered))):
            found = ', '.join(map(str, sorted(numbered)))
            raise UserError(
                f'config.surgery: {self}: {path} has the layers {found}; one is missing'
            )
        arrays = [host(numbered[index]) for index in range(len(numbered))]
        if len({array.shape for array in arrays}) > 1:
            shapes = ', '.join(str(list(array.shape)) for array in arrays)
            raise UserError(f'config.surgery: {self}: {path} would have layers of shapes {shapes}')
        return HostLeaf(np.stack(arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstack:
    """Makes arrays of their own of stacked layers: the reverse of `Stack`.

    Attributes:
        pattern: regular expression; it may match a part of a path.
        replacement: of what it matches, with {} where the layer's number goes.
    """

    pattern: str = '^blocks/'
    replacement: str = 'block_{}/'

    def __post_init__(self) -> None:
        """Raises a UserError if all layers would have one name."""
        if self.replacement.count('{}') != 1:
            raise UserError(
                f"config.surgery: {self}: the replacement has no {{}} for the layer's number"
            )

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights without the first dimension of the layers.

        Raises:
            UserError: if there are none, or one is a scalar.
        """
        new: Weights = {}
        for path, leaf in weights.items():
            match = _search(self, self.pattern, path)
            if match is None:
                new[path] = leaf
                continue
            if not leaf.shape:
                raise UserError(f'config.surgery: {self}: {path} is a scalar, no stack of layers')
            before, after = match.string[: match.start()], match.string[match.end() :]
            for index, array in enumerate(host(leaf)):
                name = before + self.replacement.replace('{}', str(index)) + after
                new[replace_place(path, name)] = HostLeaf(np.asarray(array))
        if new.keys() == weights.keys():
            raise nothing(self, weights)
        return new


def _search(operation: Stack | Unstack, pattern: str, path: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, place(path))
    except re.error as error:
        raise UserError(f'config.surgery: {operation}: {error}') from error
