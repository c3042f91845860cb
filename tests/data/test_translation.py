# SPDX-License-Identifier: Apache-2.0
"""Pairs of texts: files, verses, number words, and their tokens."""

from __future__ import annotations

import logging
import pathlib

import numpy as np
import pytest

from trainer.data import number_words, verses
from trainer.data.translation import PairFile, TextPairs, TokenizedPairs, make_bpe

PAIRS = TextPairs(['a cat', 'two cats sat'], ['un gato', 'dos'])


def test_pairs_of_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'dev.tsv').write_bytes('a cat\tun gato\r\nÁ\tñ\n'.encode())
    pattern = str(tmp_path / '{split}.tsv')
    pairs = PairFile(pattern, split='dev')
    assert (pairs.sources, pairs.targets) == (['a cat', 'Á'], ['un gato', 'ñ'])
    assert PairFile(pattern, split='dev', limit=1).sources == ['a cat']
    with pytest.raises(ValueError, match=r'no file .*test\.tsv.*a text, a tab, and its'):
        PairFile(pattern, split='test')
    for line in (b'a cat\n', b'a cat\t \n', b'a\tb\tc\n', b'\xff\ta\n'):
        (tmp_path / 'train.tsv').write_bytes(b'a\tb\n' + line)
        with pytest.raises(ValueError, match=r'train\.tsv, line 2: '):
            PairFile(pattern)
    (tmp_path / 'train.tsv').write_bytes(b'')
    with pytest.raises(ValueError, match='is empty'):
        PairFile(pattern)
    with pytest.raises(ValueError, match=r'/proc/self/mem cannot be read: \[Errno 5\]'):
        PairFile('/proc/self/mem')


def test_the_mark_of_an_editor_is_not_a_text(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'train.tsv'
    path.write_text('a cat\tun gato\n', encoding='utf-8-sig')
    assert PairFile(str(path)).sources == ['a cat']


def test_a_file_is_read_again_after_a_change(tmp_path: pathlib.Path) -> None:
    """But not for each split, whose vocabulary is made of it."""
    path = tmp_path / 'train.tsv'
    path.write_text('a cat\tun gato\n')
    first, second = PairFile(str(path)), PairFile(str(path))
    assert first.sources[0] is second.sources[0]
    second.sources.append('not in the file')
    assert PairFile(str(path)).sources == ['a cat']
    path.write_text('a dog\tun perro\n')
    assert PairFile(str(path)).sources == ['a dog']


def test_items_are_tokens_with_an_end(tmp_path: pathlib.Path) -> None:
    vocabulary = make_bpe(PAIRS, size=258, directory=str(tmp_path))
    items = TokenizedPairs(PAIRS, vocabulary)
    assert len(items) == 2 and items.vocabulary == vocabulary.checksum
    item = items[1]
    assert (item['source_text'], item['target_text']) == ('two cats sat', 'dos')
    assert items.lengths.tolist() == [len(items[i]['sources']) for i in range(2)]
    assert item['sources'].shape == item['targets'].shape == (13,)
    assert item['sources'].dtype == item['targets'].dtype == np.int32
    assert item['sources'][-1] == 1 and (item['sources'][:-1] > 1).all()
    assert item['targets'][3] == 1 and (item['targets'][4:] == 0).all()
    assert vocabulary.decode(item['targets']) == 'dos'


def test_long_pairs_are_left_out(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = make_bpe(PAIRS, size=258, directory=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        items = TokenizedPairs(PAIRS, vocabulary, max_tokens=8)
    assert [items[i]['source_text'] for i in range(len(items))] == ['a cat']
    assert items.lengths.tolist() == [8]
    assert '1 of 2 pairs have more than 8 tokens and are left out' in caplog.text
    with pytest.raises(ValueError, match='no pair has at most max_tokens=3'):
        TokenizedPairs(PAIRS, vocabulary, max_tokens=3)


def test_pairs_have_two_texts() -> None:
    with pytest.raises(ValueError, match='2 sources, but 1 targets'):
        TextPairs(['a', 'b'], ['c'])
    with pytest.raises(ValueError, match='limit: 0 pairs'):
        TextPairs(['a'], ['b'], limit=0)


def test_whole_books_are_held_out() -> None:
    books = {
        split: {v.book for v in verses.read_split(split)} for split in ('train', 'dev', 'test')
    }
    assert [len(books[split]) for split in books] == [59, 3, 4]
    assert set.union(*books.values()) == {v.book for v in verses.read()}
    sizes = {split: len(verses.Verses(split).sources) for split in books}
    assert sizes == {'train': 30_172, 'dev': 262, 'test': 643}
    [first] = verses.Verses('test', limit=1).targets
    assert first.startswith('Y ACONTECIÓ en los días de Assuero')
    with pytest.raises(ValueError, match="split: 'valid' is none of train, dev, test"):
        verses.Verses('valid')


@pytest.mark.parametrize(
    ('number', 'english', 'german'),
    [
        (0, 'zero', 'null'),
        (1, 'one', 'eins'),
        (17, 'seventeen', 'siebzehn'),
        (21, 'twenty-one', 'einundzwanzig'),
        (30, 'thirty', 'dreißig'),
        (101, 'one hundred and one', 'einhunderteins'),
        (1_001, 'one thousand and one', 'eintausendeins'),
        (1_200, 'one thousand two hundred', 'eintausendzweihundert'),
        (101_000, 'one hundred and one thousand', 'einhunderteintausend'),
        (
            761_216,
            'seven hundred and sixty-one thousand two hundred and sixteen',
            'siebenhunderteinundsechzigtausendzweihundertsechzehn',
        ),
    ],
)
def test_number_words(number: int, english: str, german: str) -> None:
    assert number_words.to_english(number) == english
    assert number_words.to_german(number) == german


def test_numbers_are_in_one_split() -> None:
    train = number_words.NumberWords('train', count=2_000)
    test = number_words.NumberWords('test', count=500)
    assert len(set(train.sources)) == 2_000 and not set(train.sources) & set(test.sources)
    assert number_words.NumberWords('test', count=10).targets == test.targets[:10]
    for split, count in (('dev', 1), ('test', 0), ('test', 10_001)):
        with pytest.raises(ValueError, match=r'split|count'):
            number_words.NumberWords(split, count=count)
