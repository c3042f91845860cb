# SPDX-License-Identifier: Apache-2.0
"""The floor of `configs/tagging.py`: each word gets its most frequent tag, in percent of words.

    python tests/tools/tagging_floor.py

The tags are counted in the training split of the config. A word that it does not have gets the most
frequent tag of all.
"""

from __future__ import annotations

import collections
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.tagged import read_split  # noqa: E402


def floor(split: str) -> float:
    """Returns the percentage of the words of a split whose tag is right."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for sentence in read_split('train'):
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    [(most, _)] = sum(counts.values(), collections.Counter()).most_common(1)
    sentences = read_split(split)
    pairs = [pair for s in sentences for pair in zip(s.words, s.tags, strict=True)]
    return 100 * sum(best.get(word, most) == tag for word, tag in pairs) / len(pairs)


if __name__ == '__main__':
    for name in ('dev', 'test'):
        print(f'{name}: {floor(name):.2f} %')
