# SPDX-License-Identifier: Apache-2.0
"""Movie sentences, texts of one's own, and their tokens."""

from __future__ import annotations

import logging
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from tests.tools.sentiment_splits import splits
from trainer.data import sentiment
from trainer.data.labeled_texts import LabeledTexts, Tokenized
from trainer.data.sentiment import Sentences
from trainer.data.words import WordPieces, Words, split


def test_no_text_is_in_two_splits() -> None:
    """Not even in other upper case or punctuation; all ids belong to a sentence with a sign."""
    texts = {name: {' '.join(split(x)) for x in Sentences(name).texts} for name in sentiment.NAMES}
    for one in texts:
        for other in texts:
            assert one == other or not texts[one] & texts[other]
    sizes = {name: len(Sentences(name)) for name in sentiment.NAMES}
    assert sizes['train'] > 8000 and min(sizes['dev'], sizes['test']) > 950
    rated = [rating for _, rating, _ in sentiment.read()]
    assert sum(sizes.values()) == np.count_nonzero(rated)


@pytest.mark.slow
def test_the_file_of_splits_is_what_the_script_writes() -> None:
    written = ''.join(f'{number}\t{name}\n' for number, name in splits().items())
    assert sentiment.SPLITS.read_text() == written


def test_labels_are_signs_of_ratings() -> None:
    rating = {text: rating for _, rating, text in sentiment.read()}
    items = [Sentences('dev', limit=50)[i] for i in range(50)]
    for item in items:
        assert item['label'] == (rating[item['text']] > 0)
        assert item['label'].dtype == np.int32
    # Any `limit` keeps both, in the order of the whole split.
    assert 15 < sum(item['label'] for item in items) < 35
    whole = iter(Sentences('dev').texts)
    assert all(item['text'] in whole for item in items)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'1\tGood.\n-\tBad.\n', r'line 2: expected a label \(0, 1, \.\.\.\), a tab.*got .-\\tBad'),
        (b'-1\tBad.\n', 'line 1: expected a label'),
        (b'1 Good.\n', 'line 1: expected a label'),
        (b'1\tGood.\n\n', r"line 2: expected .*got '\\n'"),
        (b'1\tGood.\n0\t \n', 'line 2: expected'),
        (b'1\t\xff\n', 'line 1: the line is not UTF-8'),
        (b'', 'train.tsv is empty'),
    ],
)
def test_broken_lines_are_named(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'train.tsv').write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Sentences('train', directory=str(tmp_path))
    assert str(tmp_path / 'train.tsv') in str(error.value)


def test_texts_of_ones_own(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'dev.tsv').write_text('1\tA tab\tis text. \r\n0\tNo.\n2\tSo so.', newline='')
    items = Sentences('dev', directory=str(tmp_path))
    assert [(x['text'], int(x['label'])) for x in (items[i] for i in range(3))] == [
        ('A tab\tis text.', 1),
        ('No.', 0),
        ('So so.', 2),
    ]
    with pytest.raises(ValueError, match=r'there is no file .*test\.tsv'):
        Sentences('test', directory=str(tmp_path))
    with pytest.raises(ValueError, match="split: 'valid' is none of train, dev, test"):
        Sentences('valid')


def test_words_of_a_vocabulary() -> None:
    """By frequency, then by the alphabet; rare words, and texts without words, are unknown."""
    texts = LabeledTexts(["b a! Don't", "a b DON'T a", 'once'])
    tokenizer = Words(texts, size=10)
    assert [x.tolist() for x in tokenizer(["A b don't !", 'once', ''])] == [[2, 3, 4, 1], [1], [1]]
    item = Tokenized(texts, Words(texts, size=4))[1]
    assert item['tokens'].tolist() == [2, 3, 1, 2] and item['tokens'].dtype == np.int32
    assert item['text'] == "a b DON'T a"


def test_another_vocabulary_has_another_checksum() -> None:
    """With it, the trainer refuses a model of other tokens."""
    texts = LabeledTexts(['a b', 'a b b', 'c c'])
    found = [Tokenized(texts, Words(texts, size=size)).vocabulary for size in (4, 5, 9)]
    assert found[0] != found[1] == found[2]
    assert Tokenized(texts, lambda x: len(x) * [np.ones(1, np.int32)]).vocabulary is None


def test_word_pieces_warn_of_truncated_texts(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for all texts."""
    tokenizers = pytest.importorskip('tokenizers')
    words = {'[UNK]': 0, 'a': 1, 'b': 2}
    whole = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token='[UNK]'))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.save(str(tmp_path / 'tokenizer.json'))
    logging.getLogger('trainer').propagate = True
    pieces = WordPieces(str(tmp_path), length=3)
    assert pieces.checksum == WordPieces(str(tmp_path), length=4).checksum
    assert [x.tolist() for x in pieces(['a b b', 'b'])] == [[1, 2, 2], [2]]
    assert not caplog.messages
    assert [x.tolist() for x in pieces(['a b c a', 'b', 'b b b b'])] == [[1, 2, 0], [2], [2, 2, 2]]
    assert caplog.messages == ['2 of 3 texts are truncated to 3 tokens']


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: Words(LabeledTexts(['a']), size=2),
            'size: 2, min_count: 2; expected at least 3 tokens',
        ),
        (lambda: LabeledTexts('text'), 'expected sequences of one length'),
        (lambda: LabeledTexts(['a', 'b'], [1]), r'expected sequences of one length.* \[1\]'),
        (lambda: LabeledTexts(['a'], limit=0), 'limit: 0 texts'),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_notice_is_shipped() -> None:
    notice = (sentiment.FILE.parent / 'README.md').read_text()
    assert re.search(r'MIT License.*C\.J\. Hutto', notice, flags=re.DOTALL)
