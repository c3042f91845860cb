# SPDX-License-Identifier: Apache-2.0
"""Hugging Face datasets, with the real package and local files."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.command import ROOT
from trainer.config import targets
from trainer.config.errors import UserError
from trainer.data.grain_loader import GrainLoader
from trainer.data.hf import HuggingFace, HuggingFaceStream
from trainer.data.loader import TrainLoader
from trainer.data.streaming import StreamEvalLoader, StreamLoader

datasets = pytest.importorskip('datasets', reason="needs the extra 'hf'")


@pytest.fixture(scope='module')
def saved_dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Saves forty rows in two splits, and the same as JSON lines in four files."""
    root = tmp_path_factory.mktemp('hf')
    rows = [{'x': i, 'y': [i / 2, i * 2.0], 'text': f'row {i}'} for i in range(40)]
    whole = datasets.Dataset.from_list(rows)
    parts = {'train': whole.select(range(30)), 'test': whole.select(range(30, 40))}
    datasets.DatasetDict(parts).save_to_disk(str(root / 'both'))
    whole.save_to_disk(str(root / 'one'))
    for part in range(4):
        lines = [json.dumps(row) for row in rows[part * 10 : part * 10 + 10]]
        (root / f'{part}.jsonl').write_text('\n'.join(lines))
    return root


def test_a_saved_dataset_is_a_source(saved_dataset: pathlib.Path) -> None:
    source = HuggingFace(str(saved_dataset / 'both'), split='test', keys=('x', 'y'))
    assert len(source) == 10
    read = source.gather(np.array([3, 0]))
    np.testing.assert_array_equal(read['x'], [33, 30])
    np.testing.assert_array_equal(read['y'], [[16.5, 66.0], [15.0, 60.0]])
    assert len(HuggingFace(str(saved_dataset / 'one'), keys=('x',))) == 40


@pytest.mark.slow
def test_worker_processes_read_a_dataset(saved_dataset: pathlib.Path) -> None:
    source = HuggingFace(str(saved_dataset / 'one'), keys=('x',))
    loader = GrainLoader(source=source, batch_size=8, workers=1)
    try:
        made = loader.block(0, 6)
    finally:
        loader.close()
    expected = TrainLoader(source=source, batch_size=8).block(0, 6)
    np.testing.assert_array_equal(made.arrays['x'], expected.arrays['x'])


def test_local_files_are_loaded_by_kind(saved_dataset: pathlib.Path) -> None:
    files = str(saved_dataset / '*.jsonl')
    source = HuggingFace('json', data_files=files, split='train', keys=('x',))
    np.testing.assert_array_equal(source.gather(np.arange(40))['x'], np.arange(40))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'path': 'both'}, 'split: expected one of train, test'),
        ({'path': 'both', 'split': 'other'}, "/both', split 'other': "),
        (
            {'path': 'both', 'split': 'test', 'keys': ('z',)},
            "keys: unknown ['z']; the fields are x, y, text",
        ),
        ({'path': 'nowhere'}, 'path: cannot open '),
    ],
)
def test_messages_for_mistakes(
    options: dict[str, object], message: str, saved_dataset: pathlib.Path
) -> None:
    node = {
        'target': 'trainer.data.hf:HuggingFace',
        **options,
        'path': str(saved_dataset / str(options['path'])),
    }
    with pytest.raises(UserError) as caught:
        targets.instantiate(node, 'config.data.source')
    assert message in str(caught.value)


def stream(saved_dataset: pathlib.Path) -> HuggingFaceStream:
    return HuggingFaceStream(
        'json', data_files=str(saved_dataset / '*.jsonl'), split='train', keys=('x', 'y')
    )


def test_a_stream_resumes_at_its_position(saved_dataset: pathlib.Path) -> None:
    loader = StreamLoader(source=stream(saved_dataset), batch_size=6)
    blocks = [loader.block(step, 1) for step in range(14)]
    np.testing.assert_array_equal(blocks[0].arrays['x'], [np.arange(6)])
    for step in (1, 6, 7, 13):
        again = StreamLoader(source=stream(saved_dataset), batch_size=6)
        states = blocks[step - 1].states
        assert states is not None
        again.restore(step, json.loads(json.dumps(states[0])))
        for later in range(step, min(step + 8, 14)):
            made = again.block(later, 1)
            np.testing.assert_array_equal(made.arrays['x'], blocks[later].arrays['x'])


def test_each_reader_reads_its_own_files(saved_dataset: pathlib.Path) -> None:
    seen: list[int] = []
    for rows in (np.array([0, 1]), np.array([2, 3])):
        loader = StreamEvalLoader(source=stream(saved_dataset), batch_size=4)
        arrays = [loader.block(step, 1, rows).arrays for step in range(12)]
        seen += [x for a in arrays for x in a['x'][a['_mask']].tolist()]
    assert sorted(seen) == list(range(40))
    with pytest.raises(ValueError, match='5 processes need at least 5 files, and there are 4'):
        stream(saved_dataset).shard(0, 5)


def test_a_missing_package_is_reported(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        'from data.hf import HuggingFace\n'
        'try:\n    HuggingFace("x")\n'
        'except ValueError as error:\n    print(error)'
    )
    told = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install 'jax-config-trainer[hf]'" in told.stdout
