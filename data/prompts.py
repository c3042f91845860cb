# SPDX-License-Identifier: Apache-2.0
"""Prompts for a language model, given as texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .sources import ArraySource


class Prompts(ArraySource):
    """Texts for a language model to continue.

    Fields: `tokens` int32 (longest,), padded with 0 at the end; and `length` int32 (), the number
    of tokens.

    Attributes:
        vocabulary: a checksum of the vocabulary; None for bytes.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any = None, *, start: int | None = None):
        """Tokenizes the texts.

        Args:
            texts: the prompts. The same text several times gives several samples.
            tokenizer: has a method `encode(texts)` that returns the tokens of each, such as that of
                `data.bpe.BPE`, and perhaps an attribute `checksum`, that of its vocabulary; None
                for the bytes of the texts in UTF-8.
            start: a token before each text, such as the one that ends texts in training. With it, a
                text may be empty.

        Raises:
            ValueError: if there are no texts, or a prompt has no token.
        """
        self.vocabulary: str | None = getattr(tokenizer, 'checksum', None)
        texts = [texts] if isinstance(texts, str) else list(texts)
        found = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        if tokenizer is not None:
            found = [np.asarray(tokens) for tokens in tokenizer.encode(texts)]
        if start is not None:
            found = [np.concatenate([[start], tokens]) for tokens in found]
        if not found or not all(len(tokens) for tokens in found):
            raise ValueError(
                'texts: expected at least one, and a token in each; for empty texts, give `start`'
            )
        padded = np.zeros((len(found), max(map(len, found))), np.int32)
        for row, tokens in zip(padded, found, strict=True):
            row[: len(tokens)] = tokens
        super().__init__({'tokens': padded, 'length': np.array([*map(len, found)], np.int32)})
