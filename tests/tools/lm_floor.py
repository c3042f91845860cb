# SPDX-License-Identifier: Apache-2.0
"""The floor of `configs/lm.py`: a 5-gram model with modified Kneser-Ney smoothing, interpolated.

    python tests/tools/lm_floor.py        # Python's standard library, in the tokens of the config
    python tests/tools/lm_floor.py ptb    # the Penn Treebank, in words

The n-grams are counted in the training split of the config. Formulas and discounts are those of
Chen and Goodman, 1998, "An empirical study of smoothing techniques for language modeling".
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.data.bpe import BPE  # noqa: E402
from trainer.data.bpe import train as train_bpe  # noqa: E402
from trainer.data.penn_treebank import PennTreebank  # noqa: E402
from trainer.data.text import read_texts  # noqa: E402
from trainer.data.tokens import TokenizedText  # noqa: E402

ORDER = 5


def probabilities(
    train: np.ndarray, test: np.ndarray, end: int, vocab_size: int, order: int = ORDER
) -> np.ndarray:
    """Returns the probability of each token of `test` given those before it in its sentence.

    Args:
        train: int (n,), sentences that each finish with `end`.
        test: int (m,), the same.
        end: the token that ends a sentence; it is predicted as any other token is.
        vocab_size: number of tokens.
        order: length of the longest n-grams.
    """
    start = vocab_size
    train, test = (_with_starts(x, start, end) for x in (train, test))
    tokens = np.concatenate([train, test])
    is_train = np.arange(len(tokens)) < len(train)
    is_start = tokens == start
    # The place of each token in its sentence; that of the start is 0.
    place = np.arange(len(tokens))
    place = place - np.maximum.accumulate(np.where(is_start, place, 0))

    grams = [np.zeros(len(tokens), np.int64), tokens]
    for _ in range(order - 1):
        grams.append(_extend(grams[-1], tokens, vocab_size + 1))
    p = np.full(len(tokens), 1 / vocab_size)
    for n in range(1, order + 1):
        # Shorter n-grams alone are left for the first tokens of a sentence.
        exists = (place >= n - 1) & ~is_start
        counted = np.flatnonzero(exists & is_train)
        counts = np.bincount(grams[n][counted], minlength=grams[n].max() + 1)
        if n < order:
            # In how many different tokens the n-gram continues to the left. If it starts the
            # sentence, nothing is there, and it is counted itself.
            longer = counted[place[counted] >= n]
            _, first = np.unique(grams[n + 1][longer], return_index=True)
            different = np.bincount(grams[n][longer[first]], minlength=len(counts))
            at_start = np.zeros(len(counts), bool)
            at_start[grams[n][counted[place[counted] == n - 1]]] = n > 1
            counts = np.where(at_start, counts, different)
        context = np.concatenate([[0], grams[n - 1][:-1]])
        p = np.where(exists, _interpolate(p, grams[n], context, counts, counted), p)
    return p[~is_train & ~is_start]


def _with_starts(tokens: np.ndarray, start: int, end: int) -> np.ndarray:
    """Returns the tokens with `start` before each sentence, int64."""
    first = np.concatenate([[0], np.flatnonzero(tokens[:-1] == end) + 1])
    return np.insert(tokens.astype(np.int64), first, start)


def _extend(grams: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    """Returns a number for each n-gram, given those for the n-grams that are shorter by a token."""
    before = np.concatenate([[0], grams[:-1]])
    return np.unique(before * size + tokens, return_inverse=True)[1]


def _interpolate(
    shorter: np.ndarray,
    grams: np.ndarray,
    contexts: np.ndarray,
    counts: np.ndarray,
    counted: np.ndarray,
) -> np.ndarray:
    """Returns the probability of each token by n-grams of one length and by all shorter ones.

    Args:
        shorter: (tokens,), the probability by shorter n-grams.
        grams: (tokens,), the number of the n-gram that ends with each token.
        contexts: (tokens,), the same without this token.
        counts: by number of the n-gram.
        counted: the indices of the tokens of training that end such an n-gram.
    """
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    _, first = np.unique(grams[counted], return_index=True)
    types = counted[first]  # A token for each n-gram.
    kinds = [contexts[types], contexts.max() + 1]
    whole = np.bincount(kinds[0], counts[grams[types]], minlength=kinds[1])
    saved = np.bincount(kinds[0], discounts[grams[types]], minlength=kinds[1])
    total = whole[contexts]
    with np.errstate(invalid='ignore', divide='ignore'):
        p = (counts[grams] - discounts[grams] + saved[contexts] * shorter) / total
    return np.where(total > 0, p, shorter)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns what is taken from counts of 0, 1, 2 and at least 3."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == i) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0, 0.5, 1, 1.5])  # Too few n-grams to estimate them.
    y = n1 / (n1 + 2 * n2)
    return np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])


def measure(train: Any, test: Any, vocab_size: int) -> dict[str, float]:
    """Returns the perplexities and the bits per byte of a text.

    Args:
        train: the text whose n-grams are counted, `data.tokens.TokenizedText` or another one.
        test: the text that is measured.
        vocab_size: number of tokens.
    """
    p = probabilities(train.tokens, test.tokens, train.end, vocab_size)
    bits = float(-np.log2(p).sum())
    return {
        'perplexity': 2 ** (bits / len(p)),
        'word_perplexity': 2 ** (bits / int(test.num_words.sum())),
        'bits_per_byte': bits / int(test.num_bytes.sum()),
    }


def main(name: str) -> None:
    """Prints the measurements of the splits that are not trained on."""
    if name == 'ptb':
        train: Any = PennTreebank('train')
        tests: dict[str, Any] = {split: PennTreebank(split) for split in ('dev', 'test')}
        size = len(train.words)
    else:
        texts = {split: read_texts(split=split) for split in ('train', 'test')}
        tokenizer = BPE(train_bpe(texts['train'], 8192, str(ROOT / 'runs')))
        train, test = (TokenizedText(texts[split], tokenizer) for split in ('train', 'test'))
        tests, size = {'test': test}, tokenizer.size
    for split, text in tests.items():
        found = measure(train, text, size)
        print(split, *(f'{metric} {value:.5g}' for metric, value in found.items()), sep='  ')


if __name__ == '__main__':
    main(*(sys.argv[1:] or ['python']))
