# SPDX-License-Identifier: Apache-2.0
"""Operations of `config.surgery` that convert between separate layers and those of an `nn.scan`.

Separate layers have separate arrays ('block_0/mlp/kernel', ...); scanned layers share one array
('blocks/mlp/kernel') whose dimension 0 is the layer. The slots of an optimizer are converted too.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from trainer.config.errors import UserError
from trainer.weights.leaves import HostLeaf, Leaf, Weights, key_path, read_array, with_key_path
from trainer.weights.surgery import no_match_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Stacks the arrays of numbered layers.

    Attributes:
        pattern: regular expression with one group, the number of the layer; it may match a part of
            a key path.
        replacement: replaces the match, such as 'blocks/'.
    """

    pattern: str = r'^block_(\d+)/'
    replacement: str = 'blocks/'

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the layers stacked along dimension 0.

        Raises:
            UserError: if there are no layers, one is missing, or their shapes differ.
        """
        rest: Weights = {}
        layers: dict[str, dict[int, Leaf]] = {}
        for path, leaf in weights.items():
            match = _search(self, self.pattern, path)
            if match is None:
                rest[path] = leaf
                continue
            if match.re.groups != 1 or not match[1].isdecimal():
                raise UserError(
                    f"config.surgery: {self}: the pattern needs one group, the layer's number"
                )
            new = match.string[: match.start()] + self.replacement + match.string[match.end() :]
            layers.setdefault(with_key_path(path, new), {})[int(match[1])] = leaf
        if not layers:
            raise no_match_error(self, self.pattern, weights)
        stacked = {path: self._stack(path, numbered) for path, numbered in layers.items()}
        if twice := sorted(stacked.keys() & rest.keys()):
            raise UserError(f'config.surgery: {self}: {twice[0]} already exists')
        return {**rest, **stacked}

    def _stack(self, path: str, numbered: dict[int, Leaf]) -> Leaf:
        if sorted(numbered) != list(range(len(numbered))):
            numbers = ', '.join(map(str, sorted(numbered)))
            raise UserError(
                f'config.surgery: {self}: {path} has only the layers {numbers}; one is missing'
            )
        arrays = [read_array(numbered[index]) for index in range(len(numbered))]
        if len({array.shape for array in arrays}) > 1:
            shapes = ', '.join(str(list(array.shape)) for array in arrays)
            raise UserError(
                f'config.surgery: {self}: the layers of {path} have different shapes: {shapes}'
            )
        return HostLeaf(np.stack(arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstack:
    """Splits the arrays of stacked layers: the reverse of `Stack`.

    Attributes:
        pattern: regular expression; it may match a part of a key path.
        replacement: replaces the match; {} is the number of the layer.
    """

    pattern: str = '^blocks/'
    replacement: str = 'block_{}/'

    def __post_init__(self) -> None:
        """Raises a UserError if all layers would get the same name."""
        if self.replacement.count('{}') != 1:
            raise UserError(
                f"config.surgery: {self}: the replacement needs one {{}} for the layer's number"
            )

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with one array for each layer.

        Raises:
            UserError: if nothing matches, or a match is a scalar.
        """
        new: Weights = {}
        for path, leaf in weights.items():
            match = _search(self, self.pattern, path)
            if match is None:
                new[path] = leaf
                continue
            if not leaf.shape:
                raise UserError(
                    f'config.surgery: {self}: {path} is a scalar, not a stack of layers'
                )
            before, after = match.string[: match.start()], match.string[match.end() :]
            for index, array in enumerate(read_array(leaf)):
                name = before + self.replacement.replace('{}', str(index)) + after
                new[with_key_path(path, name)] = HostLeaf(np.asarray(array))
        if new.keys() == weights.keys():
            raise no_match_error(self, self.pattern, weights)
        return new


def _search(operation: Stack | Unstack, pattern: str, path: str) -> re.Match[str] | None:
    try:
        # In the key path, so that a pattern with '^' fits parameters and slots alike.
        return re.search(pattern, key_path(path))
    except re.error as error:
        raise UserError(f'config.surgery: {operation}: {error}') from error
