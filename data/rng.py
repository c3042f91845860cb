# SPDX-License-Identifier: Apache-2.0
"""Random numbers for transforms: a function of seed, epoch and example, not of batch or process."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .order import combine


@dataclasses.dataclass
class ExampleRng:
    """Random numbers for the examples of a batch, drawn for all of them at once.

    Attributes:
        seed: the data seed.
        stream: index of the transform, so that two transforms draw different numbers.
        epochs: int64 (n,), the epoch of each row.
        ids: int64 (n,), the example in each row.
    """

    seed: int
    stream: int
    epochs: np.ndarray
    ids: np.ndarray
    _draws: int = 0

    def uniform(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns float64 in [0, 1), (n, *shape)."""
        # 53 bits, all that a float64 can hold: every value is a multiple of 2^-53, and 1 is not
        # reached.
        return (self._bits(shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns int64 in [low, high), (n, *shape)."""
        return low + np.floor(self.uniform(shape) * (high - low)).astype(np.int64)

    def normal(self, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns standard normal float64, (n, *shape), by the Box-Muller transform."""
        # log1p(-u) and not log(u): u may be 0, but never 1.
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(shape)))
        return radius * np.cos(2.0 * np.pi * self.uniform(shape))

    def generator(self, row: int) -> np.random.Generator:
        """Returns a numpy generator for the example in one row."""
        key = combine(self.seed, self.stream, self.epochs[row], self.ids[row])
        return np.random.Generator(np.random.Philox(key=int(key)))

    def _bits(self, shape: tuple[int, ...]) -> np.ndarray:
        # The number of the call is part of the key, so that two draws of one transform differ.
        self._draws += 1
        rows = combine(self.seed, self.stream, self._draws, self.epochs, self.ids)
        positions = np.arange(math.prod(shape), dtype=np.uint64)
        return combine(rows[:, None], positions[None, :]).reshape(len(rows), *shape)


def wants_rng(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter named `rng`."""
    try:
        return 'rng' in inspect.signature(function).parameters
    except ValueError:  # Functions implemented in C may have no signature.
        return False
