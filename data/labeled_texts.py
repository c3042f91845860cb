# SPDX-License-Identifier: Apache-2.0
"""Texts with a class each, read from a file, and the tokens of such texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class LabeledTexts:
    """Texts with labels, as items for `Tokenized`.

    An item has the fields `text` and `label`, int32 ().

    Attributes:
        texts: the texts, in order.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None = None,
        *,
        limit: int | None = None,
    ):
        """Keeps the texts.

        Args:
            texts: the texts.
            labels: the class of each; None for 0, if only predictions are wanted.
            limit: use only this many texts from the start.

        Raises:
            ValueError: if the limit is not positive, or there are more texts or labels.
        """
        if limit is not None and limit < 1:
            raise ValueError(f'limit: {limit} texts; expected a positive number, or None for all')
        if isinstance(texts, str) or (labels is not None and len(labels) != len(texts)):
            raise ValueError(
                f'texts, labels: expected sequences of one length, got {texts!r:.60} and '
                f'{labels!r:.60}'
            )
        self.texts = list(texts[:limit])
        given = [0] * len(texts) if labels is None else labels
        self._labels = np.array(given[:limit], np.int32)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the text at an index, and its label."""
        return {'text': self.texts[index], 'label': self._labels[index]}


def read_file(path: str) -> tuple[list[str], list[int]]:
    """Returns the texts of a file and their labels, 0, 1, ...

    Args:
        path: a file in UTF-8 with a text in each line: a label, a tab, and the text.

    Raises:
        ValueError: if there is no such file, or no text in it, or a line is broken.
    """
    if not os.path.isfile(path):
        raise ValueError(
            f'there is no file {path}, relative to {os.getcwd()}; expected a file with a label (0, '
            '1, ...), a tab, and a text in each line'
        )
    try:
        with open(path, 'rb') as file:
            rows = [_parse(line, f'{path}, line {number}') for number, line in enumerate(file, 1)]
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error}') from error
    if not rows:
        raise ValueError(f'{path} is empty; expected lines with a label, a tab, and a text')
    return [text for _, text in rows], [label for label, _ in rows]


class Tokenized:
    """Labeled texts with their tokens: items for `data.sequences.PaddedSequences`.

    An item has the fields of the texts, and `tokens`, int32 (n,) with n > 0.

    Attributes:
        vocabulary: a checksum of the words that tokens mean, by which the trainer refuses a model
            of other tokens; None if the tokenizer has none.
        lengths: int (items,), the number of tokens of each item.
    """

    def __init__(self, texts: Any, tokenizer: Callable[[Sequence[str]], list[np.ndarray]]):
        """Tokenizes all texts.

        Args:
            texts: `LabeledTexts`, or another object with a list `texts`, and items that are dicts.
            tokenizer: `data.words.Words`, `data.words.WordPieces`, or another function from texts
                to the tokens of each. Its attribute `checksum`, if any, is that of its vocabulary.
        """
        self.vocabulary: str | None = getattr(tokenizer, 'checksum', None)
        self._items = texts
        self._tokens = tokenizer(texts.texts)
        self.lengths = np.array([len(tokens) for tokens in self._tokens])

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the item at an index."""
        return {**self._items[index], 'tokens': self._tokens[index]}


def _parse(line: bytes, where: str) -> tuple[int, str]:
    """Returns the label and the text of a line."""
    try:
        # Without the byte order mark that some editors write.
        label, tab, text = line.decode('utf-8-sig').partition('\t')
    except UnicodeDecodeError as error:
        raise ValueError(f'{where}: the line is not UTF-8: {error}') from error
    if not label.isdecimal() or not tab or not text.strip():
        raise ValueError(
            f'{where}: expected a label (0, 1, ...), a tab, and a text; got {line.decode()!r:.80}'
        )
    return int(label), text.strip()
