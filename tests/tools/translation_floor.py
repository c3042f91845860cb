# SPDX-License-Identifier: Apache-2.0
"""The floor of `configs/wmt.py:verses`: a translation memory, without any learning.

    python tests/tools/translation_floor.py

The translation of a verse is that of the most similar verse of training: the one whose English has
the largest cosine of TF-IDF weights of single words and pairs of words. Prints BLEU and chrF.
"""

from __future__ import annotations

import collections
import itertools
import math
import pathlib
import re
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.verses import Verses  # noqa: E402
from trainer.scores import score_texts  # noqa: E402


def translate(split: str) -> list[str]:
    """Returns the translation of each verse of a split by the most similar one of training."""
    memory = Verses('train')
    postings: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    terms = [count_terms(text) for text in memory.sources]
    documents = collections.Counter(term for each in terms for term in each)
    rarity = {term: math.log(len(terms) / count) for term, count in documents.items()}
    for i, each in enumerate(terms):
        for term, weight in weigh(each, rarity).items():
            postings[term].append((i, weight))
    arrays = {term: (np.array(each)[:, 0].astype(int), np.array(each)[:, 1])
              for term, each in postings.items()}  # fmt: skip
    found = []
    for source in Verses(split).sources:
        cosines = np.zeros(len(terms))
        for term, weight in weigh(count_terms(source), rarity).items():
            verses, weights = arrays[term]
            cosines[verses] += weight * weights
        # A verse of unknown names only is copied.
        found.append(memory.targets[cosines.argmax()] if cosines.any() else source)
    return found


def count_terms(text: str) -> collections.Counter[str]:
    """Returns how often a text has each word and each pair of words."""
    words = re.findall(r'\w+', text.lower())
    return collections.Counter([*words, *map(' '.join, itertools.pairwise(words))])


def weigh(counts: collections.Counter[str], rarity: dict[str, float]) -> dict[str, float]:
    """Returns TF-IDF weights of norm 1, of the terms that training has."""
    weights = {term: n * rarity[term] for term, n in counts.items() if term in rarity}
    norm = math.sqrt(sum(x * x for x in weights.values())) or 1.0
    return {term: x / norm for term, x in weights.items()}


def floor(split: str) -> dict[str, float]:
    """Returns 'bleu' and 'chrf' of the translation memory."""
    scores = score_texts(translate(split), Verses(split).targets)
    return {name: scores[name] for name in ('bleu', 'chrf')}  # type: ignore[misc]


if __name__ == '__main__':
    for name in ('dev', 'test'):
        print(f'{name}: ' + ', '.join(f'{key} {x:.1f}' for key, x in floor(name).items()))
