# SPDX-License-Identifier: Apache-2.0
"""Texts as sequences of tokens: each token is a target once, and no byte or word is lost."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest

from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import check_source
from trainer.data.stages import Pack
from trainer.data.streaming import StreamLoader
from trainer.data.text import Documents, read_texts
from trainer.data.tokens import TokenizedText, TokenSequences


class Pieces:
    """A vocabulary that needs no package: each of some pieces of text is a token, 0 is the end."""

    contents = (b'', b'a', b'b', b' ', b' a', b'b\n', b'a b', b'ab', b'\n')
    end = 0
    checksum = 'pieces'

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        pattern = '|'.join(sorted((x.decode() for x in self.contents[1:]), key=len, reverse=True))
        numbers = {x.decode(): i for i, x in enumerate(self.contents)}
        return [np.array([numbers[x] for x in re.findall(pattern, t)], np.int32) for t in texts]


SPLITS = ('train', 'test')
TEXTS = ['a b ab', 'aab\n b a', 'b', ' ab a b\nabab ']


def text(texts: list[str] = TEXTS) -> TokenizedText:
    return TokenizedText(texts, Pieces())


def everything(source: TokenSequences) -> dict[str, np.ndarray]:
    return source.gather(np.arange(len(source)))


def test_bytes_and_words_are_those_of_the_texts() -> None:
    found = text()
    assert found.tokens.dtype == np.int32 and (found.tokens == 0).sum() == len(TEXTS)
    ends = np.flatnonzero(found.tokens == 0)
    for name, of in (('num_bytes', len), ('num_words', lambda x: len(x.split()))):
        sums = np.cumsum(getattr(found, name))[ends]
        assert np.diff(sums, prepend=0).tolist() == [of(x) for x in TEXTS]
    assert found.vocabulary == 'pieces'


@pytest.mark.parametrize(('seq_len', 'stride'), [(4, None), (4, 1), (5, 3), (7, 7), (21, None)])
def test_each_token_is_a_new_target_once(seq_len: int, stride: int | None) -> None:
    whole = text()
    source = TokenSequences(whole, seq_len, stride=stride)
    check_source(source)
    found = everything(source)
    is_new = found['is_new'] == 1
    np.testing.assert_array_equal(found['targets'][is_new], whole.tokens)
    # The token before each one; before the first, that which ends a text.
    np.testing.assert_array_equal(found['inputs'][is_new], [0, *whole.tokens[:-1]])
    np.testing.assert_array_equal(found['inputs'][:, 1:], found['targets'][:, :-1])
    for name in ('num_bytes', 'num_words'):
        assert found[name].sum() == getattr(whole, name).sum()
    # Each new target but those of the first sequence has enough tokens before it.
    assert is_new[1:].sum(1).max(initial=0) <= (stride or seq_len)
    assert all(row.tolist() == sorted(row.tolist()) for row in is_new)


def test_numbers_of_each_sequence_are_those_of_its_new_targets() -> None:
    found = everything(TokenSequences(text(), 6, stride=4))
    for row in range(len(found['targets'])):
        new = found['targets'][row][found['is_new'][row] == 1]
        assert found['num_bytes'][row] == sum(len(Pieces.contents[x]) for x in new)


def test_a_text_as_long_as_a_sequence() -> None:
    whole = text()
    total = len(whole.tokens)
    assert len(TokenSequences(whole, total)) == 1
    with pytest.raises(ValueError, match=rf'has {total} tokens, fewer than a sequence of'):
        TokenSequences(whole, total + 1)


@pytest.mark.parametrize('options', [{'seq_len': 0}, {'stride': 5}, {'stride': 0}, {'limit': 0}])
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(options))}: '):
        TokenSequences(text(), **{'seq_len': 4, **options})


def test_limit() -> None:
    whole, few = TokenSequences(text(), 4, stride=2), TokenSequences(text(), 4, stride=2, limit=3)
    assert len(few) == 3
    for name, x in everything(few).items():
        np.testing.assert_array_equal(x, everything(whole)[name][:3])


def test_loaders_pass_the_vocabulary_on() -> None:
    source = TokenSequences(text(), 4)
    loader = TrainLoader(source=source, batch_size=3, seed=1)
    assert loader.vocabulary == 'pieces'
    assert loader.block(0, 2).arrays['targets'].shape == (2, 3, 4)
    assert EvalLoader(source=source, batch_size=4).block(0, 1).arrays['num_words'].shape == (1, 4)


@pytest.mark.parametrize('holdout', [0.0, 0.1, 0.34, 0.5, 0.9])
def test_the_splits_of_texts_do_not_overlap(tmp_path: pathlib.Path, holdout: float) -> None:
    """Together they are the files, and the border is between two lines."""
    texts = ['one\ntwo\nthree', 'four é\nfive\n', '', 'six\n\nseven\ne\ni\ng\nht']
    for i, content in enumerate(texts):
        (tmp_path / f'{i}.txt').write_text(content)
    pattern = str(tmp_path / '*.txt')
    train = read_texts(pattern, holdout=holdout)
    test = read_texts(pattern, split='test', holdout=holdout) if holdout else []
    assert ''.join(train + test) == ''.join(texts)
    total = len(''.join(texts).encode())
    longest = len('\n'.join(max(texts, key=len).splitlines()[:1])) + 10
    assert abs(len(''.join(test).encode()) - holdout * total) <= longest
    if test:
        before = ''.join(train)
        assert before.endswith('\n') or before in (''.join(texts[:i]) for i in range(5))


def test_documents_of_tokens(tmp_path: pathlib.Path) -> None:
    """Each ends with the token for it, and rows that are packed keep them apart."""
    for i, content in enumerate(TEXTS):
        (tmp_path / f'{i}.txt').write_text(content)
    documents = Documents(str(tmp_path / '*.txt'), holdout=0, tokenizer=Pieces())
    found = [documents[i]['tokens'] for i in range(len(TEXTS))]
    np.testing.assert_array_equal(np.concatenate(found), text().tokens)
    loader = StreamLoader(
        source=documents, batch_size=2, seed=0, shuffle=False, stages=(Pack(length=10),)
    )
    assert loader.vocabulary == documents.vocabulary == 'pieces'
    row = {name: x[0, 0] for name, x in loader.block(0, 1).arrays.items()}
    loader.close()
    for number in range(1, row['tokens_segment_ids'].max() + 1):
        packed = row['tokens'][row['tokens_segment_ids'] == number]
        assert any(packed.tolist() == x.tolist()[: len(packed)] for x in found)


def test_mistakes_in_texts(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9\n')
    with pytest.raises(ValueError, match=r'a\.txt is not UTF-8'):
        read_texts(str(tmp_path / '*.txt'))
    with pytest.raises(ValueError, match=r'a\.txt is not UTF-8'):
        Documents(str(tmp_path / '*.txt'), holdout=0, tokenizer=Pieces())[0]
    (tmp_path / 'a.txt').write_text('one line')
    with pytest.raises(ValueError, match="split 'test' has none of 8 bytes"):
        read_texts(str(tmp_path / '*.txt'), split='test')
    with pytest.raises(ValueError, match=r'no file matches'):
        read_texts(str(tmp_path / '*.md'))
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'dev'"):
        read_texts(str(tmp_path / '*.txt'), split='dev')
    with pytest.raises(ValueError, match=r'/proc/self/mem cannot be read: \[Errno 5\]'):
        read_texts(['/proc/self/mem', str(tmp_path / 'a.txt')], holdout=0)


def test_the_mark_of_an_editor_is_not_a_text(tmp_path: pathlib.Path) -> None:
    """The byte order mark at the beginning of each file."""
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text('one\ntwo\n', encoding='utf-8-sig')
    assert read_texts(str(tmp_path / '*.txt'), holdout=0) == ['one\ntwo\n'] * 2
    train, test = (read_texts(str(tmp_path / '*.txt'), split=x, holdout=0.5) for x in SPLITS)
    assert train == test == ['one\ntwo\n']
