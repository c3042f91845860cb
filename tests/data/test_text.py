# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: all of it is read, and the splits do not overlap."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest

from tests.command import ROOT
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import ArraySpec
from trainer.data.text import Bytes, Documents, python_documents, python_source
from trainer.experiment import load_and_build
from trainer.trainer import Trainer


def text_of(source: Bytes, field: str = 'inputs') -> bytes:
    return source.gather(np.arange(len(source)))[field].astype(np.uint8).tobytes()


@pytest.fixture
def letters(tmp_path: pathlib.Path) -> str:
    """A file of the bytes 0..199."""
    path = tmp_path / 'letters.txt'
    path.write_bytes(bytes(range(200)))
    return str(path)


def test_targets_are_the_bytes_after_the_inputs(letters: str) -> None:
    source = Bytes(letters, 8)
    assert len(source) == 23  # 190 bytes: 23 sequences and the byte after the last.
    batch = source.gather(np.array([22, 0, 22]))
    assert batch['inputs'].tolist() == [[*range(176, 184)], [*range(8)], [*range(176, 184)]]
    assert batch['targets'].tolist() == [[*range(177, 185)], [*range(1, 9)], [*range(177, 185)]]
    spec = ArraySpec((8,), np.dtype('int32'))
    assert source.spec == {'inputs': spec, 'targets': spec}
    assert {x.dtype for x in batch.values()} == {np.dtype('int32')}
    batch['inputs'][:] = -1
    assert source.gather(np.array([0]))['inputs'].tolist() == [[*range(8)]]
    with pytest.raises(IndexError):
        source.gather(np.array([23]))


@pytest.mark.parametrize(('seq_len', 'holdout'), [(1, 0.05), (7, 0.3), (8, 0.5), (99, 0.5)])
def test_the_splits_do_not_overlap(letters: str, seq_len: int, holdout: float) -> None:
    train, test = (
        Bytes(letters, seq_len, split=split, holdout=holdout) for split in ('train', 'test')
    )
    border = 200 - round(200 * holdout)
    assert bytes(range(border)).startswith(text_of(train))
    assert bytes(range(border, 200)).startswith(text_of(test))
    # No target of training is a byte of the test.
    assert max(text_of(train, 'targets')) < border
    # Less than a sequence and its last target is left out.
    assert border - len(text_of(train)) <= seq_len
    assert 200 - border - len(text_of(test)) <= seq_len


def test_a_text_of_whole_sequences(letters: str) -> None:
    source = Bytes(letters, 199, holdout=0)
    assert (len(source), text_of(source, 'targets')) == (1, bytes(range(1, 200)))


def test_files_in_the_order_of_their_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'deep').mkdir()
    for name in ('b', 'a', 'deep/c', 'c[1]'):
        (tmp_path / f'{name}.txt').write_text(f'text of {name}. ')
    (tmp_path / 'other.md').write_text('no')

    def read(*patterns: str) -> str:
        paths = [str(tmp_path / pattern) for pattern in patterns]
        return text_of(Bytes(paths if len(paths) > 1 else paths[0], 1, holdout=0)).decode()

    # The last byte of all is a target only.
    assert read('*.txt') == 'text of a. text of b. text of c[1].'
    assert read('**/*.txt') == 'text of a. text of b. text of c[1]. text of deep/c.'
    assert read('c[1].txt') == 'text of c[1].'
    assert read('b.txt', 'a.*') == 'text of b. text of a.'


def test_limit(letters: str) -> None:
    assert len(Bytes(letters, 8, limit=3)) == 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'split': 'valid'}, "split: expected 'train' or 'test', got 'valid'"),
        ({'seq_len': 0}, 'seq_len: 0 tokens; expected a positive number'),
        ({'holdout': 1.0}, 'holdout: expected a fraction in [0, 1), got 1.0'),
        ({'holdout': 5}, 'holdout: expected a fraction in [0, 1), got 5'),
        ({'holdout': 0.0, 'split': 'test'}, "split 'test' has 0 of 200 bytes"),
        ({'seq_len': 190}, 'a sequence and its last target need 191. Use more text'),
        ({'limit': 0}, 'limit: 0 examples; expected a positive number'),
        ({'path': 'nowhere/*.txt'}, "path: no file matches 'nowhere/*.txt', relative to /"),
        ({'path': '.'}, "path: no file matches '.', relative to /"),
    ],
)
def test_mistakes(letters: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Bytes(**{'path': letters, 'seq_len': 8, **options})


def test_the_source_code_of_python() -> None:
    train, test = python_source(256), python_source(256, split='test')
    assert len(train) > 10_000
    assert 0.04 < len(test) / (len(train) + len(test)) < 0.06
    text = text_of(train).decode(errors='replace')
    assert text.count('\ndef ') > 1000
    assert text_of(python_source(256)) == text_of(train)
    assert b'build_time_vars' not in text_of(train)[:1000]
    assert len(python_source(64, limit=10)) == 10


def test_loaders_read_text(letters: str) -> None:
    source = Bytes(letters, 8)
    block = TrainLoader(source=source, batch_size=4, seed=1).block(0, 20)
    np.testing.assert_array_equal(block.arrays['inputs'][..., 0], block.ids * 8)
    np.testing.assert_array_equal(block.arrays['targets'], block.arrays['inputs'] + 1)
    last = EvalLoader(source=source, batch_size=4).block(5, 1)
    assert last.arrays['_mask'].tolist() == [[True, True, True, False]]


@pytest.mark.slow
def test_a_transformer_learns_from_text() -> None:
    """Every token is a classification; the loss at chance level is log(256) = 5.5."""
    source = {'target': 'trainer.data.text:python_source', 'seq_len': 32, 'limit': 2000}
    task = {'inputs': 'inputs', 'label': 'targets'}
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'),
        train_for='60 steps',
        model={
            'target': 'trainer.models.transformer:Transformer',
            'layers': 1,
            'width': 32,
            'heads': 2,
        },
        task={'target': 'trainer.tasks:Classification', **task},
        data={'source': source, 'batch_size': 16, 'device_transforms': ()},
        evals__test__data={
            'source': {**source, 'split': 'test', 'limit': 100},
            'device_transforms': (),
        },
        optimizer={'target': 'optax:adam', 'learning_rate': 0.01},
    )
    result = Trainer(experiment).fit()
    assert result.metrics['eval/test/examples'] == 100
    assert result.metrics['eval/test/loss'] < 4.0


def test_documents_are_files(tmp_path: pathlib.Path) -> None:
    for i in range(10):
        (tmp_path / f'{i}.txt').write_bytes(bytes([65 + i]) * (i + 1))
    pattern = str(tmp_path / '*.txt')
    train, test = (
        Documents(pattern, holdout=0.2),
        Documents(pattern, split='test', holdout=0.2),
    )
    assert (len(train), len(test)) == (8, 2)
    tokens = test[1]['tokens']
    assert tokens.tolist() == [74] * 10 and tokens.dtype == np.int32
    assert test.describe(1) == str(tmp_path / '9.txt')
    for options, message in (
        ({'split': 'other'}, "expected 'train' or 'test', got 'other'"),
        ({'holdout': 1.0}, r'holdout: .* got 1\.0'),
        ({'split': 'test', 'holdout': 0.0}, "split 'test' gets none of 10 files"),
    ):
        with pytest.raises(ValueError, match=message):
            Documents(pattern, **options)
    with pytest.raises(ValueError, match='no file matches'):
        Documents(str(tmp_path / '*.md'))


def test_the_documents_of_python() -> None:
    train, test = python_documents(), python_documents(split='test')
    assert len(train) > 15 * len(test) > 0
    assert bytes(train[0]['tokens'].astype(np.uint8)).decode()
