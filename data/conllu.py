# SPDX-License-Identifier: Apache-2.0
"""Reads words and their parts of speech from CoNLL-U, the format of Universal Dependencies."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

from .checked_file import read_bytes

# https://universaldependencies.org/format.html
_COLUMNS = ('ID', 'FORM', 'LEMMA', 'UPOS', 'XPOS', 'FEATS', 'HEAD', 'DEPREL', 'DEPS', 'MISC')


class Sentence(NamedTuple):
    """A sentence.

    Attributes:
        words: its words, at least one.
        tags: the part of speech of each word; '' if it has none.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read(path: str | os.PathLike[str], *, sha256: str | None = None) -> list[Sentence]:
    """Returns the sentences of a file.

    Words are those with a number of their own: of a multi-word token, such as `3-4 zum`, the parts
    (`3 zu`, `4 dem`); empty nodes (`5.1`) and comments are left out.

    Args:
        path: a file in UTF-8, compressed if its name ends in '.gz'.
        sha256: checksum of its unpacked content; None for any content.

    Raises:
        ValueError: if the file cannot be read or is damaged, naming the line.
    """
    file = pathlib.Path(path).expanduser()
    content = read_bytes(file, sha256)
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    # An empty line ends a sentence; at the end of a file it may be missing.
    for number, encoded in enumerate([*content.split(b'\n'), b''], 1):
        where = f'{file}:{number}'
        try:
            line = encoded.decode('utf-8-sig').rstrip('\r')
        except UnicodeDecodeError as error:
            raise ValueError(f'{where}: expected text in UTF-8; {error}') from error
        if not line.strip():
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags)))
                words, tags = [], []
        elif not line.startswith('#'):
            _add_word(line, where, words, tags)
    return sentences


def _add_word(line: str, where: str, words: list[str], tags: list[str]) -> None:
    """Adds the word of a line, unless the line is a multi-word token or an empty node."""
    columns = line.split('\t')
    if len(columns) != len(_COLUMNS):
        raise ValueError(
            f'{where}: {len(columns)} columns; expected {len(_COLUMNS)}, separated by tabs: '
            f'{", ".join(_COLUMNS)}. The line is {line!r:.100}'
        )
    index, word, tag = columns[0], columns[1], columns[3]
    first, _, last = index.partition('-' if '-' in index else '.')
    if first.isdecimal() and last.isdecimal():
        return
    if index != str(len(words) + 1):
        raise ValueError(
            f'{where}: the ID is {index!r}; expected {len(words) + 1}, the number of the word in '
            'its sentence. An empty line ends a sentence'
        )
    if not word:
        raise ValueError(f'{where}: the word (FORM, column 2) is empty')
    words.append(word)
    tags.append('' if tag == '_' else tag)
