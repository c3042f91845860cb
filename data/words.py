# SPDX-License-Identifier: Apache-2.0
"""Tokens of texts: words of a vocabulary, or word pieces of a pretrained model."""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

PADDING, UNKNOWN = 0, 1

_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def split(text: str) -> list[str]:
    """Returns the words of a text in lower case; a punctuation mark is a word of its own."""
    return _WORD.findall(text.lower())


class Words:
    """The most frequent words of some texts, as tokens from 2; all others are the token 1.

    Attributes:
        checksum: of the words and their tokens.
    """

    def __init__(self, texts: Any, *, size: int, min_count: int = 2):
        """Counts the words.

        Args:
            texts: what the vocabulary is made from: the texts of training, whatever is tokenized.
                An object with a list `texts`, such as `data.sentiment.Sentences`.
            size: tokens are below this number.
            min_count: words that occur less often are unknown. 2 or more, so that training has
                unknown words; with 1, only word dropout trains the unknown word.

        Raises:
            ValueError: if an argument is out of range.
        """
        if size < 3 or min_count < 1:
            raise ValueError(
                f'size: {size}, min_count: {min_count}; expected at least 3 tokens (0 is padding, '
                '1 an unknown word) and a count of at least 1'
            )
        frequent = _rank(tuple(texts.texts), min_count)
        self._tokens = {word: token for token, word in enumerate(frequent[: size - 2], 2)}
        self.checksum = _checksum_tokens(self._tokens)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32 (n,); a text without words is an unknown word."""
        tokens = [[self._tokens.get(word, UNKNOWN) for word in split(text)] for text in texts]
        return [np.array(each or [UNKNOWN], np.int32) for each in tokens]


# The sources of training and of evaluations count the same texts.
@functools.lru_cache(maxsize=1)
def _rank(texts: tuple[str, ...], min_count: int) -> list[str]:
    """Returns the words of some texts that are frequent enough, the most frequent first."""
    counts = collections.Counter(word for text in texts for word in split(text))
    frequent = [word for word, count in counts.items() if count >= min_count]
    # Words of the same frequency by the alphabet, so that the order of the texts is irrelevant.
    return sorted(frequent, key=lambda word: (-counts[word], word))


class WordPieces:
    """Word pieces by the library `tokenizers`, with the special tokens of the model around them.

    Attributes:
        checksum: of the word pieces and their tokens.
    """

    def __init__(self, path: str, *, length: int):
        """Loads the tokenizer.

        Args:
            path: a Hugging Face `tokenizer.json`, or the directory that contains it.
            length: longer texts are truncated to so many tokens, with a warning.

        Raises:
            ValueError: if there is no such file, or the library is not installed.
        """
        self._length = length
        self._tokenizer = load_tokenizer(path)
        self.checksum = _checksum_tokens(self._tokenizer.get_vocab())
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32 (n,)."""
        encoded = self._tokenizer.encode_batch(list(texts))
        if truncated := sum(bool(each.overflowing) for each in encoded):
            _log.warning(
                '%d of %d texts are truncated to %d tokens', truncated, len(encoded), self._length
            )
        return [np.array(each.ids, np.int32) for each in encoded]


def checksum(vocabulary: bytes) -> str:
    """Returns a checksum of a vocabulary, given as bytes that differ if a token does."""
    return hashlib.sha256(vocabulary).hexdigest()[:12]


def _checksum_tokens(tokens: Mapping[str, int]) -> str:
    return checksum(repr(sorted(tokens.items())).encode())


def import_tokenizers() -> Any:
    """Returns the library `tokenizers`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "the package 'tokenizers' is not installed: pip install tokenizers"
        ) from error
    return tokenizers


def load_tokenizer(path: str) -> Any:
    """Returns a `tokenizers.Tokenizer`.

    Args:
        path: a Hugging Face `tokenizer.json`, or the directory that contains it.

    Raises:
        ValueError: if there is no such file, it cannot be read, or the library is not installed.
    """
    tokenizers = import_tokenizers()
    path = os.path.expanduser(path)
    path = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(
            f'tokenizer: no file {path}, relative to {os.getcwd()}; expected a Hugging Face '
            'tokenizer.json, or the directory that contains it'
        )
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # The library raises no other class.
        raise ValueError(
            f'{path} is no tokenizer of Hugging Face, or is damaged: {error}'
        ) from error
