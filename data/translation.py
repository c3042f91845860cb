# SPDX-License-Identifier: Apache-2.0
"""Pairs of texts, a source and its translation, as tokens for `data.sequences.PaddedSequences`."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import bpe

_log = logging.getLogger(__name__)


class TextPairs:
    """Sources and their translations.

    Attributes:
        sources: the texts to translate.
        targets: the translation of each.
    """

    def __init__(self, sources: Sequence[str], targets: Sequence[str], *, limit: int | None = None):
        """Keeps the texts.

        Args:
            sources: texts.
            targets: their translations.
            limit: use only this many pairs from the start.

        Raises:
            ValueError: if there are no pairs, or not as many translations as texts.
        """
        if len(sources) != len(targets):
            raise ValueError(f'{len(sources)} sources, but {len(targets)} targets')
        if limit is not None and limit < 1:
            raise ValueError(f'limit: {limit} pairs; expected a positive number, or None for all')
        self.sources = list(sources[:limit])
        self.targets = list(targets[:limit])
        if not self.sources:
            raise ValueError('there are no pairs of texts')


class PairFile(TextPairs):
    """Pairs of texts from a file in UTF-8: a source, a tab, and its translation in each line."""

    def __init__(self, path: str, *, split: str = 'train', limit: int | None = None):
        """Reads the file.

        Args:
            path: the file; '{split}' in it is replaced with the split.
            split: such as 'train', 'dev' or 'test'.
            limit: use only this many lines from the start.

        Raises:
            ValueError: if there is no such file, it cannot be read or has no line, or a line is
                broken.
        """
        path = path.replace('{split}', split)
        name = os.path.expanduser(path)
        if not os.path.isfile(name):
            raise ValueError(
                f'there is no file {path}, relative to {os.getcwd()}; expected a file with a text, '
                'a tab, and its translation in each line'
            )
        changed = os.stat(name)
        pairs = _read(name, limit, (changed.st_mtime_ns, changed.st_size))
        if not pairs:
            raise ValueError(f'{path} is empty; expected lines with a text, a tab, and a text')
        super().__init__([source for source, _ in pairs], [target for _, target in pairs])


# A config reads the pairs of training again for the vocabulary of each split: two files, so that
# another split does not replace them.
@functools.lru_cache(maxsize=2)
def _read(path: str, limit: int | None, version: tuple[int, int]) -> list[tuple[str, str]]:
    """Returns the pairs of a file, of which `version` is the time of its last change and its size.

    Raises:
        ValueError: if it cannot be read, or a line is broken.
    """
    try:
        with open(path, 'rb') as file:
            lines = enumerate(itertools.islice(file, limit), 1)
            return [_parse(line, f'{path}, line {number}') for number, line in lines]
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error}') from error


def make_bpe(pairs: Any, *, size: int, directory: str) -> bpe.BPE:
    """Returns one vocabulary for both languages, made from pairs of texts at first use.

    Args:
        pairs: `TextPairs`: those of training.
        size: number of tokens.
        directory: where the vocabulary is kept.

    Raises:
        ValueError: if the size is too small, or the library `tokenizers` is not installed.
    """
    digest = _hash(tuple(pairs.sources), tuple(pairs.targets), size)
    return bpe.BPE(bpe.train([*pairs.sources, *pairs.targets], size, directory, digest=digest))


@functools.lru_cache(maxsize=1)  # All splits and scores have the same vocabulary.
def _hash(sources: tuple[str, ...], targets: tuple[str, ...], size: int) -> str:
    return bpe.hash_texts((*sources, *targets), size)


class TokenizedPairs:
    """Pairs of texts and their tokens: items for `data.sequences.PaddedSequences`.

    An item has the fields `sources` and `targets`, int32 (n,), tokens with the end of the text (1);
    the shorter one is padded with 0, so that both have one length. `source_text` and
    `target_text` are the texts.

    Attributes:
        vocabulary: a checksum of the vocabulary, by which the trainer refuses a model of other
            tokens.
        lengths: int (items,), the tokens of each item.
    """

    def __init__(self, pairs: Any, vocabulary: bpe.BPE, *, max_tokens: int | None = None):
        """Tokenizes all texts.

        Args:
            pairs: `TextPairs`, or another object with lists `sources` and `targets`.
            vocabulary: the tokens of both languages.
            max_tokens: leave out pairs of which a text has more tokens, with the end; the log says
                how many they are. For training: an evaluation of other pairs is not comparable.

        Raises:
            ValueError: if no pair is left.
        """
        self.vocabulary = vocabulary.checksum
        # Each with the end.
        encoded = [
            [np.append(tokens, np.int32(bpe.END)) for tokens in vocabulary.encode(texts)]
            for texts in (pairs.sources, pairs.targets)
        ]
        longest = np.maximum(*(np.array([len(x) for x in texts]) for texts in encoded))
        kept = np.arange(len(longest))
        if max_tokens is not None:
            kept = np.flatnonzero(longest <= max_tokens)
            if len(kept) < len(longest):
                left_out = len(longest) - len(kept)
                of = f'{left_out} of {len(longest)} pairs'
                _log.warning('%s have more than %d tokens and are left out', of, max_tokens)
        if not len(kept):
            raise ValueError(f'no pair has at most max_tokens={max_tokens} tokens')
        self._sources, self._targets = ([texts[i] for i in kept] for texts in encoded)
        self.lengths = longest[kept]
        self._texts = [(pairs.sources[i], pairs.targets[i]) for i in kept]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the item at an index."""
        source, target = self._texts[index]
        sources, targets = self._sources[index], self._targets[index]
        length = max(len(sources), len(targets))
        return {
            'sources': _pad(sources, length),
            'targets': _pad(targets, length),
            'source_text': source,
            'target_text': target,
        }


def _pad(tokens: np.ndarray, length: int) -> np.ndarray:
    return np.pad(tokens, (0, length - len(tokens)), constant_values=bpe.PADDING)


def _parse(line: bytes, where: str) -> tuple[str, str]:
    """Returns the two texts of a line."""
    try:
        # Without the byte order mark that some editors write.
        source, _, target = line.decode('utf-8-sig').rstrip('\r\n').partition('\t')
    except UnicodeDecodeError as error:
        raise ValueError(f'{where}: the line is not UTF-8: {error}') from error
    if not source.strip() or not target.strip() or '\t' in target:
        raise ValueError(f'{where}: expected a text, a tab, and a text; got {line.decode()!r:.80}')
    return source, target
