# SPDX-License-Identifier: Apache-2.0
"""Writes which movie sentences belong to train, dev and test.

    python tests/tools/sentiment_splits.py

Sentences are nearly equal if their words, without punctuation and words with an apostrophe, have a
Jaccard similarity of at least 0.6. Nearly equal sentences are in the same split, and so are chains
of such sentences. A hash decides the split of each such group, 80 % train, 10 % dev and 10 % test:
the hash of a group is the smallest of its texts.
"""

from __future__ import annotations

import collections
import hashlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.sentiment import SPLITS, read  # noqa: E402
from trainer.data.words import split  # noqa: E402

# A fraction, so that comparisons are exact.
SIMILAR = (3, 5)


def splits() -> dict[int, str]:
    """Returns the split of each sentence by its id, without those that are rated 0.

    The sentences are in the order of their hashes, so that the first ones of a split have both
    labels.
    """
    rated = {number: split(text) for number, rating, text in read() if rating}
    words = {number: frozenset(w for w in text if w.isalnum()) for number, text in rated.items()}
    group = _groups(words, _similar_pairs(words))
    smallest: dict[int, float] = {}
    for number, text in rated.items():
        fraction = _fraction(' '.join(text))
        smallest[group[number]] = min(fraction, smallest.get(group[number], 1.0))
    ordered = sorted(rated, key=lambda number: (_fraction(' '.join(rated[number])), number))
    fractions = {number: smallest[group[number]] for number in ordered}
    return {n: 'dev' if x < 0.1 else 'test' if x < 0.2 else 'train' for n, x in fractions.items()}


def _similar_pairs(words: dict[int, frozenset[str]]) -> set[tuple[int, int]]:
    """Returns the pairs of sentences whose words have a Jaccard similarity of at least 0.6."""
    part, whole = SIMILAR
    counts = collections.Counter(word for each in words.values() for word in each)
    by_word = collections.defaultdict(list)
    for number, each in words.items():
        # Two sets of this similarity share a word among the rarest 40 % of either.
        rare = sorted(each, key=lambda word: (counts[word], word))
        for word in rare[: len(each) - -(-part * len(each) // whole) + 1]:
            by_word[word].append(number)
    pairs = {
        (a, b) for numbers in by_word.values() for i, a in enumerate(numbers) for b in numbers[:i]
    }
    return {
        (a, b)
        for a, b in pairs
        if whole * len(words[a] & words[b]) >= part * len(words[a] | words[b])
    }


def _groups(numbers: collections.abc.Iterable[int], pairs: set[tuple[int, int]]) -> dict[int, int]:
    """Returns for each sentence the smallest id of the sentences that pairs connect it with."""
    parent = {number: number for number in numbers}

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {number: root(number) for number in parent}


def _fraction(text: str) -> float:
    """Returns a hash of the text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64


if __name__ == '__main__':
    SPLITS.write_text(''.join(f'{number}\t{name}\n' for number, name in splits().items()))
    print(collections.Counter(splits().values()))
