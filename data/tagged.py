# SPDX-License-Identifier: Apache-2.0
"""Sentences with a part of speech for each word, for `trainer.data.sequences:PaddedSequences`."""

from __future__ import annotations

import collections
import glob
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import conllu, treebank
from .conllu import Sentence
from .words import checksum

SPLITS = ('train', 'dev', 'test')
# Ids of words and characters; the next ones are those of the training split, most frequent first.
PADDING, UNKNOWN = 0, 1
# The id of a missing tag.
UNTAGGED = -1

# What is one word in the treebank, too. The first alternative that fits is taken.
_WORD = re.compile(
    r"""
    \d+(?:[.,:]\d+)*\w*(?:['\u2019]\w+)?  # a number, also with letters: 3,5 or 25'i or 3D
    | \w+(?:['\u2019-]\w+)*  # a word, also with an apostrophe or hyphen in it
    | \.{2,} | -{2,} | `` | ''
    | [:;]-?[()DPS](?!\w)  # a smiley
    | [^\w\s]
    """,
    re.VERBOSE,
)


class TaggedSentences:
    """The sentences of a split, as numbers.

    Words and characters have the numbers of the training split: a word that is rare there, or
    missing, is unknown (1), and the model has to tag it by its characters and the words around it.
    Tags have those of `list_tags`.

    An example of n words has the fields `inputs/words` int32 (n,), `inputs/characters` int32
    (n, word_length), `tag` int32 (n,), -1 for a word without a tag, and `text`, the words with a
    tab between them. Padding of words and characters is 0.

    Attributes:
        vocabulary: a checksum of what the numbers mean, by which the trainer refuses a model of
            other numbers.
        lengths: int (sentences,), the number of words of each sentence.
    """

    def __init__(
        self,
        split: str,
        *,
        path: str | None = None,
        text: str | None = None,
        max_words: int = 8192,
        max_characters: int = 128,
        min_count: int = 2,
        word_length: int = 16,
        limit: int | None = None,
    ):
        """Reads the sentences.

        Args:
            split: 'train', 'dev' or 'test'.
            path: CoNLL-U files: a pattern with '{split}' in it for a file of each split, such as
                'de_gsd-ud-{split}.conllu'; or one without, such as 'mine/*.conllu': then, of ten
                sentences of a file, the ninth is in 'dev' and the tenth in 'test'. By default the
                Turkish Web Treebank, in this way.
            text: a file of plain text to tag in place of the split, a sentence on each line.
            max_words: number of ids of words, and so of embeddings in the model.
            max_characters: number of ids of characters.
            min_count: a word that is less frequent in the training split is unknown.
            word_length: characters per word; of longer words the last, because endings tell more.
            limit: use only this many sentences from the start of the split. The ids stay the same.

        Raises:
            ValueError: if a file cannot be read, or an argument is not valid.
        """
        if min(max_words, max_characters) <= UNKNOWN + 1 or word_length < 1:
            raise ValueError(
                f'max_words={max_words}, max_characters={max_characters}, word_length='
                f'{word_length}: expected at least 3 ids, two of which are those of padding and of '
                'what is unknown, and a positive length'
            )
        train = read_split('train', path)
        word_ids = _number((w for s in train for w in s.words), max_words, min_count)
        character_ids = _number((c for s in train for w in s.words for c in w), max_characters, 1)
        sentences = (read_split(split, path) if text is None else read_text(text))[:limit]
        if not sentences:
            raise ValueError(f'there are no sentences in {text or f"the split {split!r}"}')
        self._text = ['\t'.join(sentence.words) for sentence in sentences]
        tag_ids = {'': UNTAGGED, **{tag: i for i, tag in enumerate(list_tags(path))}}
        numbers = [list(ids) for ids in (word_ids, character_ids, tag_ids)]
        self.vocabulary = checksum(repr(numbers).encode())
        self._tag = [np.array([tag_ids[tag] for tag in s.tags], np.int32) for s in sentences]
        # Each word is encoded once.
        words = list(dict.fromkeys(w for sentence in sentences for w in sentence.words))
        index = {word: i for i, word in enumerate(words)}
        self._index = [np.array([index[w] for w in s.words]) for s in sentences]
        self.lengths = np.array([len(sentence) for sentence in self._index])
        self._word = np.array([word_ids.get(w, UNKNOWN) for w in words], np.int32)
        self._characters = _encode_characters(words, character_ids, word_length)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = self._index[index]
        inputs = {'words': self._word[words], 'characters': self._characters[words]}
        return {'inputs': inputs, 'tag': self._tag[index], 'text': self._text[index]}


def read_split(split: str, path: str | None = None) -> list[Sentence]:
    """Returns the sentences of a split; for the arguments see `TaggedSentences`.

    Raises:
        ValueError: for another split, and for files that do not exist or cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f'split: {split!r} is none of {", ".join(SPLITS)}')
    if path is not None and '{split}' in path:
        return [s for file in _list_files(path.replace('{split}', split)) for s in file]
    files = treebank.read() if path is None else _list_files(path)
    # The position in the file, so that another file changes nothing in the split of this one.
    remainders = {'train': range(8), 'dev': (8,), 'test': (9,)}[split]
    return [s for file in files for i, s in enumerate(file) if i % 10 in remainders]


def list_tags(path: str | None = None) -> list[str]:
    """Returns the tags of all splits, sorted: the names of their ids 0, 1, 2, ...

    Args:
        path: as for `TaggedSentences`; the files of all three splits are read.

    Raises:
        ValueError: if one of them does not exist or cannot be read.
    """
    # Not those of training alone: the tags belong to the annotation scheme, so a tag that is only
    # in another split is a mistake of the model, and not an error of the data.
    sentences = (s for split in SPLITS for s in read_split(split, path))
    return sorted({tag for s in sentences for tag in s.tags} - {''})


def read_text(path: str) -> list[Sentence]:
    """Returns the lines of a text in UTF-8 as sentences without tags; empty lines are left out.

    A letter and a separate accent become one character (NFC), as in the treebank.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        # Without the byte order mark that some editors write.
        with open(os.path.expanduser(path), encoding='utf-8-sig') as file:
            words = [tuple(_WORD.findall(unicodedata.normalize('NFC', line))) for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'text: {path} cannot be read: {error}') from error
    return [Sentence(each, ('',) * len(each)) for each in words if each]


def _list_files(pattern: str) -> list[list[Sentence]]:
    path = os.path.expanduser(pattern)
    # The name of a file may have brackets, so it is not always a pattern.
    names = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if not names:
        raise ValueError(
            f'path: no file {pattern!r}, relative to {os.getcwd()}; expected CoNLL-U files'
        )
    return [conllu.read(name) for name in names]


def _encode_characters(words: Sequence[str], ids: Mapping[str, int], length: int) -> np.ndarray:
    """Returns the ids of the last characters of each word, int32 (words, length)."""
    characters = np.full((len(words), length), PADDING, np.int32)
    for row, word in zip(characters, words, strict=True):
        row[: len(word)] = [ids.get(c, UNKNOWN) for c in word[-length:]]
    return characters


def _number(items: Iterable[str], size: int, min_count: int) -> dict[str, int]:
    """Returns ids of the most frequent items, fewer than `size`."""
    # Items that are as frequent stay in the order of the text, so that ids are always the same.
    common = collections.Counter(items).most_common(size - UNKNOWN - 1)
    kept = [item for item, count in common if count >= min_count]
    return {item: i for i, item in enumerate(kept, UNKNOWN + 1)}
