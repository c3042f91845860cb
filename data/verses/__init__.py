# SPDX-License-Identifier: Apache-2.0
"""Verses of the Bible in English and Spanish, read from the file beside this one."""

from __future__ import annotations

import functools
import pathlib
from typing import NamedTuple

from ..checked_file import read_bytes
from ..translation import TextPairs

FILE = pathlib.Path(__file__).parent / 'en_es.tsv.gz'

# Whole books, because the verses of one repeat each other. None of these has a book beside it that
# tells the same (as Mark, Matthew and Luke do, Kings and Chronicles, Ephesians and Colossians, Jude
# and II Peter): a model that has learned the other by heart would seem to translate.
BOOKS = {
    # A story, a prophet, a letter.
    'dev': ('Ruth', 'Joel', 'Philippians'),
    # A story of a court, wisdom, a prophet in verse, and a letter.
    'test': ('Esther', 'Ecclesiastes', 'Amos', 'James'),
}

# Of the unpacked file.
_SHA256 = '28cacecafe64a225e0c598da92895717f2d617b68d63fb0a05ac92744dc6b0eb'


class Verse(NamedTuple):
    """A verse in two languages."""

    book: str
    chapter: int
    number: int
    english: str
    spanish: str


class Verses(TextPairs):
    """English verses and their Spanish translations, in the order of the Bible.

    `BOOKS` lists the books of 'dev' (262 verses) and 'test' (643); 'train' has all others.
    """

    def __init__(self, split: str, *, limit: int | None = None):
        """Reads a split.

        Args:
            split: 'train', 'dev' or 'test'.
            limit: use only this many verses from the start.

        Raises:
            ValueError: if the split is unknown, or the file is damaged.
        """
        verses = read_split(split)
        super().__init__([v.english for v in verses], [v.spanish for v in verses], limit=limit)


def read_split(split: str) -> list[Verse]:
    """Returns the verses of a split.

    Raises:
        ValueError: if the split is unknown, or the file is damaged.
    """
    if split not in ('train', *BOOKS):
        raise ValueError(f'split: {split!r} is none of train, {", ".join(BOOKS)}')
    held_out = {book for books in BOOKS.values() for book in books}
    if split == 'train':
        return [verse for verse in read() if verse.book not in held_out]
    return [verse for verse in read() if verse.book in BOOKS[split]]


@functools.cache
def read() -> tuple[Verse, ...]:
    """Returns all 31,077 verses.

    Raises:
        ValueError: if the file is damaged.
    """
    rows = (line.split('\t') for line in read_bytes(FILE, _SHA256).decode().splitlines())
    return tuple(
        Verse(book, int(chapter), int(number), english, spanish)
        for book, chapter, number, english, spanish in rows
    )
