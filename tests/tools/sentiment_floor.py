# SPDX-License-Identifier: Apache-2.0
"""The floor of `configs/sentiment.py`: naive Bayes on words and pairs of words.

    python tests/tools/sentiment_floor.py [training sentences]

It is trained on the train split, and has nothing to tune: each word or pair counts once per
sentence, and counts are smoothed by one (Laplace).
"""

from __future__ import annotations

import collections
import itertools
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.sentiment import Sentences  # noqa: E402
from trainer.data.words import split  # noqa: E402


def floor(evaluated: str = 'test', limit: int | None = None) -> float:
    """Returns the accuracy on a split, after training on all sentences or on so many."""
    counts: tuple[collections.Counter[str], ...] = (collections.Counter(), collections.Counter())
    sentences = [0, 0]
    for label, terms in _read('train', limit):
        counts[label].update(terms)
        sentences[label] += 1
    terms = counts[0].keys() | counts[1].keys()
    totals = [count.total() + len(terms) for count in counts]
    ratio = {
        term: math.log((counts[1][term] + 1) / totals[1])
        - math.log((counts[0][term] + 1) / totals[0])
        for term in terms
    }
    prior = math.log(sentences[1] / sentences[0])
    guesses = [
        (label, prior + sum(ratio.get(term, 0.0) for term in sorted(terms)) > 0)
        for label, terms in _read(evaluated)
    ]
    return sum(label == guess for label, guess in guesses) / len(guesses)


def most_frequent(evaluated: str = 'test') -> float:
    """Returns the accuracy of the more frequent label."""
    labels = [label for label, _ in _read(evaluated)]
    return max(labels.count(0), labels.count(1)) / len(labels)


def _read(name: str, limit: int | None = None) -> list[tuple[int, set[str]]]:
    """Returns the label, and the words and pairs of words, of each sentence of a split."""
    found = []
    for each in (items := Sentences(name, limit=limit)).texts:
        words = split(each)
        pairs = {f'{a} {b}' for a, b in itertools.pairwise(words)}
        found.append({*words, *pairs})
    return [(int(items[i]['label']), terms) for i, terms in enumerate(found)]


if __name__ == '__main__':
    number = int(sys.argv[1]) if sys.argv[1:] else None
    for name in ('test', 'dev', 'train'):
        bayes, frequent = 100 * floor(name, number), 100 * most_frequent(name)
        print(f'{name}: naive Bayes {bayes:.1f} %, the more frequent label {frequent:.1f} %')
