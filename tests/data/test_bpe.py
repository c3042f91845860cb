# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding: exact round trips, the same file from each process, errors."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import command
from trainer.data import bpe

TEXTS = ['the cat sat on the mat', 'the dog sat on the cat', 'el gato comió'] * 3


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bpe.BPE:
    return bpe.BPE(bpe.train(TEXTS, 270, str(tmp_path_factory.mktemp('bpe'))))


@pytest.mark.parametrize(
    'text', ['the cat', ' two  spaces ', 'ñandú 東京 \U0001f600\n', '', 'a <end> <padding> b', '\0']
)
def test_texts_come_back_unchanged(vocabulary: bpe.BPE, text: str) -> None:
    [tokens] = vocabulary.encode([text])
    assert tokens.dtype == np.int32 and (tokens > bpe.END).all()
    assert vocabulary.decode(tokens) == text
    # What follows the end does not belong to the text.
    padded = [*tokens, 270, bpe.END, *tokens, bpe.PADDING]  # 270: an output without a token.
    assert vocabulary.decode(padded) == text


def test_frequent_texts_have_fewer_tokens(vocabulary: bpe.BPE) -> None:
    assert vocabulary.size == 270
    [known, other] = vocabulary.encode(['the cat sat', 'xhq vzt wkj'])
    assert len(known) < len(other) == 11


def test_a_broken_character_is_marked(vocabulary: bpe.BPE) -> None:
    [tokens] = vocabulary.encode(['é'])
    assert len(tokens) == 2 and vocabulary.decode(tokens[:1]) == '\ufffd'


def test_the_file_is_made_once(tmp_path: pathlib.Path) -> None:
    path = bpe.train(TEXTS, 270, str(tmp_path / 'new'))
    before = pathlib.Path(path).stat()
    assert bpe.train(TEXTS, 270, str(tmp_path / 'new')) == path
    assert pathlib.Path(path).stat() == before
    assert [each.name for each in (tmp_path / 'new').iterdir()] == [pathlib.Path(path).name]


def test_other_texts_have_another_file(tmp_path: pathlib.Path) -> None:
    joined = [TEXTS[0] + TEXTS[1], *TEXTS[2:]]
    given = [(TEXTS, 270), (TEXTS, 269), (TEXTS[:-1], 270), (joined, 270)]
    assert len({bpe.train(texts, size, str(tmp_path)) for texts, size in given}) == 4


def test_each_process_makes_the_same_file(tmp_path: pathlib.Path) -> None:
    """Also where strings have other hashes."""
    path = pathlib.Path(bpe.train(TEXTS, 270, str(tmp_path)))
    code = 'from trainer.data import bpe; import sys; print(bpe.train(eval(sys.argv[1]), 270, "."))'
    other = tmp_path / 'other'
    other.mkdir()
    env = {**command.environment(), 'PYTHONHASHSEED': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    words = [sys.executable, '-c', code, repr(TEXTS)]
    subprocess.run(words, check=True, cwd=other, env=env, capture_output=True)
    assert (other / path.name).read_bytes() == path.read_bytes()


def test_mistakes_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='size: 257 tokens; expected at least 258'):
        bpe.train(TEXTS, 257, str(tmp_path))
    with pytest.raises(ValueError, match=r'no file .*missing'):
        bpe.BPE(str(tmp_path / 'missing.json'))
    foreign = tmp_path / 'foreign.json'
    path = pathlib.Path(bpe.train(TEXTS, 270, str(tmp_path)))
    foreign.write_text(path.read_text().replace('<end>', '<other>'))
    with pytest.raises(ValueError, match=r'first tokens are not <padding> and <end>'):
        bpe.BPE(str(foreign))
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ValueError, match='pip install tokenizers'):
        bpe.train(TEXTS, 271, str(tmp_path))
