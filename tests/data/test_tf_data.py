# SPDX-License-Identifier: Apache-2.0
"""Pipelines of tf.data, with the real TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.command import ROOT
from trainer.data.streaming import StreamEvalLoader, StreamLoader
from trainer.data.tf_data import TFData


def make_shuffled() -> Any:
    """Twenty numbers, in a different order in each of many passes."""
    tf = pytest.importorskip('tensorflow')
    numbers = tf.data.Dataset.range(20).shuffle(7).repeat()
    return numbers.map(lambda x: {'x': x}, num_parallel_calls=4)


def make_eleven() -> Any:
    tf = pytest.importorskip('tensorflow')
    return tf.data.Dataset.range(11).map(lambda x: {'x': x})


def bare() -> Any:
    tf = pytest.importorskip('tensorflow')
    return tf.data.Dataset.range(3)


@pytest.fixture
def tensorflow() -> Any:
    return pytest.importorskip('tensorflow', reason="needs the extra 'tf'")


def test_a_pipeline_resumes_at_its_position(tensorflow: Any) -> None:
    loader = StreamLoader(source=TFData(make_shuffled, seed=3), batch_size=6)
    blocks = [loader.block(step, 1) for step in range(10)]
    assert len({x.tobytes() for x in (b.arrays['x'] for b in blocks)}) == 10
    for step in (1, 4, 9):
        again = StreamLoader(source=TFData(make_shuffled, seed=3), batch_size=6)
        states = blocks[step - 1].states
        assert states is not None
        again.restore(step, json.loads(json.dumps(states[0])))
        np.testing.assert_array_equal(again.block(step, 1).arrays['x'], blocks[step].arrays['x'])
    other = StreamLoader(source=TFData(make_shuffled, seed=4), batch_size=6)
    assert (other.block(0, 1).arrays['x'] != blocks[0].arrays['x']).any()


@pytest.mark.parametrize('readers', [1, 2, 3])
def test_readers_share_a_pipeline(readers: int, tensorflow: Any) -> None:
    seen: list[int] = []
    for reader in range(readers):
        loader = StreamEvalLoader(source=TFData(make_eleven), batch_size=6)
        rows = np.arange(reader * 6 // readers, (reader + 1) * 6 // readers)
        arrays = [loader.block(step, 1, rows).arrays for step in range(3)]
        seen += [x for a in arrays for x in a['x'][a['_mask']].tolist()]
    assert sorted(seen) == list(range(11))


def test_an_invalid_pipeline_is_reported(tensorflow: Any) -> None:
    with pytest.raises(TypeError, match='make: expected a function'):
        TFData(make_eleven())
    with pytest.raises(TypeError, match='expected elements that are dicts of tensors'):
        StreamLoader(source=TFData(bare), batch_size=1).block(0, 1)
    with pytest.raises(TypeError, match=r'expected it to return a tf\.data\.Dataset, got 3'):
        StreamLoader(source=TFData(lambda: 3), batch_size=1).block(0, 1)


def test_a_missing_tensorflow_is_reported() -> None:
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        'from data.tf_data import TFData\n'
        'try:\n    TFData(print)\n'
        'except ValueError as error:\n    print(error)'
    )
    told = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install 'jax-config-trainer[tf]'" in told.stdout
