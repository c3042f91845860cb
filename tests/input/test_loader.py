# SPDX-License-Identifier: Apache-2.0
"""The loader protocols: the documented example trains, and our loaders conform."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import ml_collections
import numpy as np
import pytest

from tests import command
from tests.command import ROOT
from trainer.config.loading import LoadedConfig
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import ArraySource
from trainer.data.streaming import StreamEvalLoader, StreamLoader
from trainer.experiment import build
from trainer.input import loader as contract
from trainer.input.data import EvalData, TrainData
from trainer.trainer import Trainer

EXAMPLE, CONFIG = (
    textwrap.dedent(found)
    for found in re.findall(r':\n\n((?:    .*\n|\n)+)', contract.__doc__ or '')
)


def source() -> ArraySource:
    return ArraySource({'x': np.arange(50, dtype=np.float32)})


TRAIN: dict[str, Any] = {
    'TrainLoader': lambda: TrainLoader(source=source(), batch_size=4),
    'GrainLoader': lambda: GrainLoader(source=source(), batch_size=4),
    'StreamLoader': lambda: StreamLoader(source=source(), batch_size=4),
}
EVAL: dict[str, Any] = {
    'EvalLoader': lambda: EvalLoader(source=source(), batch_size=4),
    'StreamEvalLoader': lambda: StreamEvalLoader(source=source(), batch_size=4),
}


def example_trainer(workdir: pathlib.Path) -> Trainer:
    config = ml_collections.ConfigDict()
    exec(CONFIG, {'config': config})
    config.train_for = '2 epochs'
    config.model = {'target': 'trainer.models.mlp:MLP', 'features': (16, 10)}
    config.task = {'target': 'trainer.tasks:Classification'}
    config.optimizer = {'target': 'optax:sgd', 'learning_rate': 0.1}
    config.log = {'every': '10 steps', 'tensorboard': False}
    made = build(LoadedConfig(config=config, name='mine', arg='', path=pathlib.Path('mine.py')))
    return Trainer(made, str(workdir))


@pytest.mark.slow
def test_the_example_trains_and_resumes_exactly(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'loader.py').write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert example_trainer(tmp_path / 'whole').fit().step == 63  # 2 x 1000 / 32, rounded up.
    assert example_trainer(tmp_path / 'parts').fit(max_steps=13).status == 'paused'
    assert example_trainer(tmp_path / 'parts').fit().status == 'finished'
    whole, parts = (command.result(tmp_path / name) for name in ('whole', 'parts'))
    assert (whole['digest'], whole['data_digest']) == (parts['digest'], parts['data_digest'])
    losses = [row['train/loss'] for row in command.rows(tmp_path / 'whole')]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', TRAIN)
def test_our_training_loaders_follow_the_protocol(name: str) -> None:
    loader = TRAIN[name]()
    assert isinstance(loader, contract.TrainLoader)
    assert isinstance(loader, contract.StreamLoader) == (name == 'StreamLoader')
    data = TrainData.from_loader(loader, 'config.data.loader')
    assert data.is_stream == (name == 'StreamLoader')
    assert data.examples == (None if data.is_stream else 50)
    assert data.steps_per_epoch == (None if data.is_stream else 12.5)
    assert data.first_example()['x'].shape == (1,)
    data.restore(0, None)
    block = data.block(0, 3)
    assert isinstance(block, contract.StreamBlock)
    assert (block.states is not None) == data.is_stream
    assert block.arrays['x'].shape == block.ids.shape == (3, 4)
    assert data.marks == () != data.with_batch_sizes(((0, 2), (7, 4))).marks
    data.close()


@pytest.mark.parametrize('name', EVAL)
def test_our_evaluation_loaders_follow_the_protocol(name: str) -> None:
    loader = EVAL[name]()
    assert isinstance(loader, contract.EvalLoader)
    data = EvalData.from_loader(loader, 'config.evals.test.data.loader')
    assert data.num_batches == (None if name == 'StreamEvalLoader' else 13)
    assert data.rows == 4
    assert {'x', '_mask'} == set(data.spec) == set(data.block(0, 1).arrays)
    assert data.first_example()['x'].tolist() == [0]
    data.close()


@pytest.mark.slow
def test_our_loaders_have_the_types_of_the_protocol() -> None:
    lines = ['import trainer.input.loader as contract']
    for module, name, protocol in (
        ('loader', 'TrainLoader', 'TrainLoader'),
        ('loader', 'TrainLoader', 'Resizable'),
        ('loader', 'TrainLoader', 'HasFirst'),
        ('loader', 'EvalLoader', 'EvalLoader'),
        ('loader', 'Block', 'StreamBlock'),
        ('grain_loader', 'GrainLoader', 'TrainLoader'),
        ('grain_loader', 'GrainLoader', 'Resizable'),
        ('grain_loader', 'GrainLoader', 'HasFirst'),
        ('grain_loader', 'GrainLoader', 'Closable'),
        ('streaming', 'StreamLoader', 'StreamLoader'),
        ('streaming', 'StreamLoader', 'Resizable'),
        ('streaming', 'StreamLoader', 'Closable'),
        ('streaming', 'StreamEvalLoader', 'EvalLoader'),
        ('streaming', 'StreamEvalLoader', 'Closable'),
    ):
        lines += [
            f'import data.{module}',
            f'def f{len(lines)}(x: data.{module}.{name}) -> contract.{protocol}: return x',
        ]
    code = '\n'.join(lines)
    wrong = f'{code}\ndef g(x: data.loader.TrainLoader) -> contract.StreamLoader: return x'
    for text, expected in ((code, 0), (wrong, 1)):
        options = ['--config-file=', '--ignore-missing-imports', '-c', text]
        checked = subprocess.run(
            [sys.executable, '-m', 'mypy', *options], cwd=ROOT, capture_output=True, text=True
        )
        assert checked.returncode == expected, checked.stdout
