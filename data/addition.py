# SPDX-License-Identifier: Apache-2.0
"""Sums of two numbers as text, made when they are asked for: '48+7' and its answer '55'."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .rng import ExampleRng
from .sources import Arrays, ArraySpec

# A token is a place in it; 0 stands behind the end of each text.
ALPHABET = ' 0123456789+'


class Numbered:
    """Examples that are nothing but their number: a transform makes the rest.

    Field: `index` int64 ().
    """

    def __init__(self, count: int):
        """Counts them.

        Args:
            count: examples of an epoch.
        """
        self._count = count

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {'index': ArraySpec((), np.dtype(np.int64))}

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the numbers themselves."""
        return {'index': np.array(indices, np.int64)}


@dataclasses.dataclass(frozen=True)
class Addition:
    """Draws a sum for each example: another one in each epoch.

    One sum in ten is held out, together with the one of the exchanged numbers: a model that knows
    them has learned to add.

    Fields: `inputs` int32 (2 x digits + 1,), `lengths` int32 () of them, and `targets` int32
    (digits + 2,): the answer, its last digit first, and at least one 0 behind it.

    Attributes:
        digits: of the largest numbers, at most 7: there is a table of all.
        held_out: draw from the sums that are held out, or from the others.
    """

    digits: int = 3
    held_out: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 7:
            raise ValueError(f'digits: expected 1 to 7, got {self.digits}')

    def __call__(self, batch: Arrays, rng: ExampleRng) -> Arrays:
        """Returns the three fields in the place of all others."""
        count = 10**self.digits
        dealt, group = _groups(count)
        # A sum is held out if the groups of both numbers add up to ten, or to none.
        a = rng.integers(0, count)
        other = np.zeros_like(a) if self.held_out else rng.integers(1, 10)
        b = dealt[(other - group[a]) % 10, rng.integers(0, count // 10)]

        first, second = np.char.mod('%d', a), np.char.mod('%d', b)
        questions = np.char.add(np.char.add(first, '+'), second)
        answers = [text[::-1] for text in np.char.mod('%d', a + b)]
        return {
            'inputs': encode(questions, 2 * self.digits + 1),
            'lengths': np.char.str_len(questions).astype(np.int32),
            'targets': encode(np.array(answers), self.digits + 2),
        }


@functools.cache
def _groups(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals the numbers below `count` into ten groups.

    Returns:
        The numbers of each group (10, count / 10), and the group of each number (count,).
    """
    dealt = np.random.default_rng(0).permutation(count).reshape(10, -1)
    group = np.empty(count, np.int64)
    group[dealt] = np.arange(10)[:, None]
    return dealt, group


def encode(texts: np.ndarray, length: int) -> np.ndarray:
    """Returns texts (n,) as tokens, int32 (n, length), with 0 behind each of them."""
    codes = texts.astype(f'U{length}').view(np.uint32).reshape(len(texts), length)
    table = np.zeros(128, np.int32)
    table[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    return table[codes]


def decode(tokens: np.ndarray) -> list[str]:
    """Returns the texts of tokens (n, length), each up to its first 0."""
    texts = (''.join(ALPHABET[token] for token in row) for row in tokens)
    return [text.split(' ')[0] for text in texts]
