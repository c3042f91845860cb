# SPDX-License-Identifier: Apache-2.0
"""Addition problems as text, generated on the fly: '48+7' and its answer '55'."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .rng import ExampleRng
from .sources import Arrays, ArraySpec

# A token is an index into it; 0 pads the end of each text.
ALPHABET = ' 0123456789+'


class Numbered:
    """Examples that consist of their index only; a transform generates the other fields.

    Field: `index` int64 ().
    """

    def __init__(self, count: int):
        """Sets the size of the source.

        Args:
            count: number of examples in an epoch.
        """
        self._count = count

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {'index': ArraySpec((), np.dtype(np.int64))}

    def __len__(self) -> int:
        return self._count

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the indices themselves, as the field `index`."""
        return {'index': np.array(indices, np.int64)}


@dataclasses.dataclass(frozen=True)
class Addition:
    """Draws a random sum for each example, a different one in each epoch.

    One sum in ten is held out, together with its mirror image (a+b and b+a), so a model that
    answers the held-out sums has learned to add and not memorized them.

    Fields: `inputs` int32 (2 x digits + 1,); `lengths` int32 (), the number of characters in
    `inputs`; and `targets` int32 (digits + 2,), the answer with its last digit first, followed by
    at least one 0.

    Attributes:
        digits: number of digits of the largest numbers, at most 7 (a table of all numbers is in
            memory).
        held_out: True draws from the held-out sums, False from all others.
    """

    digits: int = 3
    held_out: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 7:
            raise ValueError(f'digits: expected 1 to 7, got {self.digits}')

    def __call__(self, batch: Arrays, rng: ExampleRng) -> Arrays:
        """Returns a batch with these three fields only."""
        count = 10**self.digits
        by_group, group = _groups(count)
        # A sum is held out if the groups of its two numbers add up to 0 modulo 10. The condition is
        # symmetric, so a+b and b+a are always on the same side.
        a = rng.integers(0, count)
        # `other` is the sum of the two groups modulo 10; the group of b follows from it and from
        # that of a. So every draw is valid, and no rejection loop depends on the batch.
        other = np.zeros_like(a) if self.held_out else rng.integers(1, 10)
        b = by_group[(other - group[a]) % 10, rng.integers(0, count // 10)]

        first, second = np.char.mod('%d', a), np.char.mod('%d', b)
        questions = np.char.add(np.char.add(first, '+'), second)
        # Last digit first: that is the order in which a carry is computed, so each digit depends
        # only on what precedes it.
        answers = [text[::-1] for text in np.char.mod('%d', a + b)]
        return {
            'inputs': encode(questions, 2 * self.digits + 1),
            'lengths': np.char.str_len(questions).astype(np.int32),
            'targets': encode(np.array(answers), self.digits + 2),
        }


@functools.cache
def _groups(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns the numbers below `count` to ten groups of equal size, at random.

    Returns:
        The numbers of each group (10, count / 10), and the group of each number (count,).
    """
    # A fixed seed: which sums are held out must be the same for training and testing, in every run.
    by_group = np.random.default_rng(0).permutation(count).reshape(10, -1)
    group = np.empty(count, np.int64)
    group[by_group] = np.arange(10)[:, None]
    return by_group, group


def encode(texts: np.ndarray, length: int) -> np.ndarray:
    """Returns texts (n,) as tokens, int32 (n, length), padded with 0 at the end."""
    # numpy stores text as code points of 4 bytes, padded with zeros; so a view of them needs no
    # loop over characters.
    codes = texts.astype(f'U{length}').view(np.uint32).reshape(len(texts), length)
    table = np.zeros(128, np.int32)
    table[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    return table[codes]


def decode(tokens: np.ndarray) -> list[str]:
    """Returns the texts of tokens (n, length), each up to its first 0."""
    texts = (''.join(ALPHABET[token] for token in row) for row in tokens)
    return [text.split(' ')[0] for text in texts]
