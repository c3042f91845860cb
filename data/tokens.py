# SPDX-License-Identifier: Apache-2.0
"""Texts as one long row of tokens, in sequences of equal length, for language models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .sources import Arrays, ArraySpec

_SPACE = tuple(b' \t\n\r\f\v')


class TokenizedText:
    """Texts as tokens, each followed by the token that ends a text.

    Attributes:
        tokenizer: that of the texts.
        tokens: int32 (tokens,), of all texts.
        end: the token that ends a text.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any):
        """Tokenizes the texts.

        Args:
            texts: such as `data.text.read_texts`.
            tokenizer: `data.bpe.BPE`, `data.bpe.GPT2`, or another object with their attributes
                `contents`, `end` and `checksum`, and their method `encode`.
        """
        self.tokenizer = tokenizer
        self.end: int = tokenizer.end
        tail = np.array([self.end], np.int32)
        self.tokens = np.concatenate(
            [part for tokens in tokenizer.encode(texts) for part in (tokens, tail)]
        )

    @property
    def vocabulary(self) -> str:
        """A checksum of the vocabulary."""
        return str(self.tokenizer.checksum)

    @functools.cached_property
    def num_bytes(self) -> np.ndarray:
        """The number of bytes of each token, int32 (tokens,); 0 for the end of a text."""
        return np.array([len(x) for x in self.tokenizer.contents], np.int32)[self.tokens]

    @functools.cached_property
    def num_words(self) -> np.ndarray:
        """The number of words that begin in each token, int32 (tokens,).

        A word is what is between white space, as in `bytes.split`, so the sum over a text is the
        number of its words.
        """
        contents = self.tokenizer.contents
        starts = np.array([_count_starts(x) for x in contents], np.int32)
        # A word may also begin with the first byte of a token, after a space at the end of another.
        begins = np.array([x[:1] != b'' and x[0] not in _SPACE for x in contents])
        ends = np.array([x == b'' or x[-1] in _SPACE for x in contents])
        before = np.concatenate([[True], ends[self.tokens[:-1]]])
        return starts[self.tokens] + (begins[self.tokens] & before).astype(np.int32)


def _count_starts(content: bytes) -> int:
    """Returns how many words begin after the first byte."""
    return sum(a in _SPACE and b not in _SPACE for a, b in itertools.pairwise(content))


class TokenSequences:
    """Sequences of equal length, from the beginning of a text to its end.

    The token that ends a text is before the first one, so that each token of the text is a target.
    The last sequence ends with the text, and may therefore overlap with the one before it.

    Fields: `inputs` int32 (seq_len,); `targets` int32 (seq_len,), the token after each of them;
    `is_new` float32 (seq_len,), 1 for targets that no earlier sequence has, 0 for all others; and
    `num_bytes` and `num_words`, int32 (), how many bytes the new targets have, and how many words
    begin in them. As the weights of the loss, `is_new` counts each token of the text once.
    """

    def __init__(
        self, text: Any, seq_len: int, *, stride: int | None = None, limit: int | None = None
    ):
        """Finds the sequences.

        Args:
            text: `TokenizedText`, `data.penn_treebank.PennTreebank`, or another object with their
                attributes `tokens`, `end`, `num_bytes`, `num_words` and `vocabulary`.
            seq_len: tokens per sequence.
            stride: new targets per sequence; by default all of them. With fewer, each new target
                has at least `seq_len - stride` tokens before it, which improves evaluations.
            limit: use only this many sequences from the start.

        Raises:
            ValueError: if the text is shorter than a sequence, or an argument is out of range.
        """
        stride = seq_len if stride is None else stride
        if not 1 <= stride <= seq_len:
            raise ValueError(
                f'seq_len: {seq_len}, stride: {stride}; expected a positive number of tokens, of '
                'which at least one and at most all are new'
            )
        if limit is not None and limit < 1:
            raise ValueError(f'limit: {limit} sequences; expected a positive number, or None')
        total = len(text.tokens)
        if total < seq_len:
            raise ValueError(
                f'the text has {total:,} tokens, fewer than a sequence of {seq_len}: use more text '
                'or a shorter seq_len'
            )
        self.vocabulary: str = text.vocabulary
        self._seq_len = seq_len
        self._row = np.concatenate([[text.end], text.tokens]).astype(np.int32)
        # How many targets the sequences up to each one have together.
        covered = np.append(np.arange(seq_len, total, stride), total)
        self._stop = covered[:limit]
        self._new_from = np.concatenate([[0], covered[:-1]])[:limit]
        self._sums = {
            name: np.concatenate([[0], np.cumsum(getattr(text, name), dtype=np.int64)])
            for name in ('num_bytes', 'num_words')
        }

    def __len__(self) -> int:
        return len(self._stop)

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        row, number = ArraySpec((self._seq_len,), np.dtype(np.int32)), ArraySpec((), np.dtype('i4'))
        is_new = ArraySpec((self._seq_len,), np.dtype(np.float32))
        return {
            'inputs': row, 'targets': row, 'is_new': is_new,
            'num_bytes': number, 'num_words': number,
        }  # fmt: skip

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the sequences at `indices` (n,)."""
        stop, new_from = self._stop[indices], self._new_from[indices]
        place = (stop - self._seq_len)[:, None] + np.arange(self._seq_len)
        sums = {name: (x[stop] - x[new_from]).astype(np.int32) for name, x in self._sums.items()}
        return {
            'inputs': self._row[place],
            'targets': self._row[place + 1],
            'is_new': (place >= new_from[:, None]).astype(np.float32),
            **sums,
        }
