# SPDX-License-Identifier: Apache-2.0
"""Sentences about movies, positive or negative, read from the files beside this one."""

from __future__ import annotations

import functools
import os
import pathlib

from ..checked_file import read_bytes
from ..labeled_texts import LabeledTexts, read_file

FILE = pathlib.Path(__file__).parent / 'movie_sentences.tsv.gz'
SPLITS = pathlib.Path(__file__).parent / 'splits.tsv'

NAMES = ('train', 'dev', 'test')

# Of the unpacked file.
_SHA256 = 'c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350'


class Sentences(LabeledTexts):
    """Sentences of movie reviews, positive (label 1) or negative (0), or texts of your own.

    The label of a movie sentence is the sign of its mean rating; one whose mean is 0 is in no
    split. `splits.tsv` lists those of each split; nearly equal sentences are in the same.
    """

    def __init__(self, split: str, *, directory: str = '', limit: int | None = None):
        """Reads a split.

        Args:
            split: 'train', 'dev' or 'test'.
            directory: a directory with the files `train.tsv`, `dev.tsv` and `test.tsv`, which are
                read in place of the movie sentences (`data.labeled_texts.read_file`).
            limit: use only this many sentences: the first ones of `splits.tsv`, which have both
                labels, or of a file of your own. None for all.

        Raises:
            ValueError: if the split is unknown, or a file is missing or damaged.
        """
        if split not in NAMES:
            raise ValueError(f'split: {split!r} is none of {", ".join(NAMES)}')
        if directory:
            path = os.path.join(os.path.expanduser(directory), f'{split}.tsv')
            texts, labels = read_file(path)
        else:
            # Not the first ones of the file: they are all positive.
            ids = set([number for number, name in _read_splits() if name == split][:limit])
            chosen = [each for each in read() if each[0] in ids]
            texts = [text for *_, text in chosen]
            labels = [int(rating > 0) for _, rating, _ in chosen]
        super().__init__(texts, labels, limit=limit)


def read() -> list[tuple[int, float, str]]:
    """Returns the id, the mean rating (-4 to 4) and the text of all sentences.

    Raises:
        ValueError: if the file is damaged.
    """
    return list(_read())


@functools.cache
def _read() -> tuple[tuple[int, float, str], ...]:
    content = read_bytes(FILE, _SHA256)
    rows = (line.split('\t') for line in content.decode().splitlines())
    return tuple((int(number), float(rating), text) for number, rating, text in rows)


@functools.cache
def _read_splits() -> tuple[tuple[int, str], ...]:
    """Returns the id and the split of each sentence that has one."""
    rows = (line.split('\t') for line in SPLITS.read_text().splitlines())
    return tuple((int(number), name) for number, name in rows)
