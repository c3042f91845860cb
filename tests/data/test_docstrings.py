# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the standard library in word pieces."""

from __future__ import annotations

import ast
import gc
import pathlib

import numpy as np
import pytest

from trainer.data.docstrings import PACKAGES, Docstrings, encode

tokenizers = pytest.importorskip('tokenizers')


@pytest.fixture(scope='module')
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Hugging Face tokenizer of whole words, with special tokens around each text."""
    words = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', 'return', 'the', 'message', 'process', 'element')
    pieces = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]')
    )
    pieces.normalizer = tokenizers.normalizers.BertNormalizer()
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    root = tmp_path_factory.mktemp('tokenizer')
    pieces.save(str(root / 'tokenizer.json'))
    return root


def test_rows_have_one_length(directory: pathlib.Path) -> None:
    found = encode(['Return the message!', 'the ' * 20], str(directory), 8)
    assert found.dtype == np.int32
    assert found.tolist() == [[2, 4, 5, 6, 1, 3, 0, 0], [2, 5, 5, 5, 5, 5, 5, 3]]


@pytest.mark.slow
def test_each_text_is_in_one_split(directory: pathlib.Path) -> None:
    """A quarter of each package is held out; no text is in both splits."""
    splits = {
        split: Docstrings(str(directory / 'tokenizer.json'), split=split, length=64)
        for split in ('train', 'test')
    }
    train, test = (splits[name].gather(np.arange(len(splits[name]))) for name in splits)
    assert len(test['label']) / len(train['label']) == pytest.approx(1 / 3, rel=0.2)
    assert set(train['label']) == set(test['label']) == set(range(len(PACKAGES)))
    again = Docstrings(str(directory), split='test', packages=PACKAGES[:2], limit=10)
    assert len(again) == 10
    # Long enough rows of known words are texts of their own.
    rows = {tuple(row) for row in train['tokens'] if (row > 3).sum() > 12}
    assert not rows & {tuple(row) for row in test['tokens'] if (row > 3).sum() > 12}


def test_garbage_collection_that_parses_during_a_parse(directory: pathlib.Path) -> None:
    """In Python 3.11, a parse fails with SystemError if another one runs inside it."""

    def parse(phase: str, info: dict[str, int]) -> None:
        del phase, info
        ast.parse('x')

    thresholds = gc.get_threshold()
    gc.callbacks.append(parse)
    gc.set_threshold(20, 10**6, 10**6)
    try:
        found = Docstrings(str(directory), packages=('http',), limit=10)
    finally:
        gc.callbacks.remove(parse)
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    assert len(found) == 10


@pytest.mark.slow
def test_mistakes(directory: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r'no file nowhere/tokenizer\.json'):
        Docstrings('nowhere/tokenizer.json')
    with pytest.raises(ValueError, match=r"no package 'asyncoi'"):
        Docstrings(str(directory), packages=('asyncoi',))
    with pytest.raises(ValueError, match="expected 'train' or 'test', got "):
        Docstrings(str(directory), split='valid')
