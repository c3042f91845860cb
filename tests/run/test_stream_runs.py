# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a stream: its position is saved and restored, or an error says why not."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from tests import command
from tests.command import ROOT
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.data.mnist import MNIST
from trainer.experiment import Experiment, load_and_build
from trainer.trainer import Trainer
from trainer.weights import restore

TINY = {
    'model__layers': 1,
    'model__width': 16,
    'model__heads': 2,
    'data__batch_size': 8,
    'train_for': '40 steps',
    'checkpoint__every': '10 steps',
    'checkpoint__keep_last': 9,
    'log__every': '10 steps',
    'evals__test__every': '20 steps',
    'evals__test__data__batch_size': 64,
}
FLAGS = [f'--config.{name.replace("__", ".")}={value}' for name, value in TINY.items()]
PACKED = (f'--config={ROOT}/configs/lm_packed.py', *FLAGS)


def build(**overrides: Any) -> Experiment:
    return load_and_build(str(ROOT / 'configs' / 'lm_packed.py'), **{**TINY, **overrides})


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns an uninterrupted run."""
    workdir = tmp_path_factory.mktemp('whole')
    assert Trainer(build(), str(workdir)).fit().status == 'finished'
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize('calls', [1, pytest.param(7, marks=pytest.mark.slow)])
def test_a_resumed_stream_is_the_same_run(
    calls: int, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stopped inside a block of batches, and continued by another trainer."""
    first = Trainer(build(steps_per_call=calls), str(tmp_path))
    assert first.fit(max_steps=13).status == 'paused'
    result = Trainer(build(steps_per_call=calls), str(tmp_path)).fit()
    assert result.status == 'finished'
    mine, other = command.result(tmp_path), command.result(whole)
    assert mine['data_digest'] == other['data_digest']
    if calls == 1:
        assert mine['digest'] == other['digest']
    assert mine['metrics']['eval/test/examples'] == other['metrics']['eval/test/examples']


@pytest.mark.slow
def test_a_pause_in_memory_continues_after_the_last_step(whole: pathlib.Path) -> None:
    """Batches that were prefetched before the pause are read again."""
    trainer = Trainer(build())
    while trainer.fit(max_steps=9).status == 'paused':
        pass
    result = trainer.fit()
    assert result.metrics['eval/test/loss'] == command.result(whole)['metrics']['eval/test/loss']


@pytest.mark.slow
def test_the_losses_are_of_a_language_model(whole: pathlib.Path) -> None:
    losses = [row['train/loss'] for row in command.rows(whole) if 'train/loss' in row]
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_stream_without_a_position_restarts_if_allowed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of the checkpoint was not a stream; the rest of the state is kept."""
    plain = {
        'data__loader': {'target': 'trainer.data.loader:TrainLoader'},
        'data__source': {'target': 'trainer.data.text:python_source', 'seq_len': 128},
        'task': {'tokens': 'inputs', 'segments': None, 'positions': None},
        'evals': {},
    }
    config = str(ROOT / 'configs' / 'lm_packed.py')
    Trainer(load_and_build(config, **{**TINY, **plain}), str(tmp_path)).fit(max_steps=10)
    with pytest.raises(UserError, match='another config'):
        Trainer(build(), str(tmp_path)).fit()
    capsys.readouterr()
    result = Trainer(build(), str(tmp_path), allow_config_change=True).fit()
    assert (result.status, result.step) == ('finished', 40)
    assert (
        'Restarting the data from the beginning, because the config changed.'
        in capsys.readouterr().out
    )


def is_small(example: dict[str, Any]) -> bool:
    return bool(example['label'] < 3)


def filter_overrides() -> list[str]:
    loader = {
        'target': 'trainer.data.streaming:StreamEvalLoader',
        'stages': [
            {'target': 'trainer.data.stages:Filter', 'keep': {'ref': f'{__name__}:is_small'}}
        ],
    }
    return [f'--config.evals.test.data.loader={json.dumps(loader)}']


@pytest.mark.slow
def test_a_filtered_evaluation_on_processes(tmp_path: pathlib.Path) -> None:
    """With 1, 2 and 3 processes, whose parts differ in length, the metrics equal numpy's."""
    options = (*filter_overrides(), '--config.train_for=20steps', '--config.data.batch_size=48')
    for count in (1, 2, 3):
        workdir = tmp_path / str(count)
        group.train(count, workdir, *options)
        metrics = command.result(workdir)['metrics']
        found = [metrics[f'eval/test/{name}'] for name in ('examples', 'accuracy', 'loss')]
        examples, accuracy, loss = compute_by_hand(workdir / 'checkpoints' / '20' / 'state')
        assert found[0] == examples > 200
        assert found[1:] == pytest.approx([accuracy, loss], rel=1e-4)


def compute_by_hand(checkpoint: pathlib.Path) -> tuple[int, float, float]:
    """Returns examples, accuracy and loss of the filtered split by numpy, for saved parameters."""
    everything = MNIST('test', limit=1000).gather(np.arange(1000))
    small = everything['label'] < 3
    labels = everything['label'][small]
    x = everything['image'][small].reshape(len(labels), -1) / 255.0
    layers = [restore.raw(checkpoint, at=f'params/Dense_{number}') for number in range(2)]
    hidden = np.maximum(x @ layers[0]['kernel'] + layers[0]['bias'], 0)
    logits = hidden @ layers[1]['kernel'] + layers[1]['bias']
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return len(labels), (logits.argmax(-1) == labels).mean(), loss


@pytest.mark.slow
def test_a_stream_of_two_processes(tmp_path: pathlib.Path) -> None:
    """Each process has its own position: two processes resume exactly, one cannot."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'

    def train(workdir: pathlib.Path, *args: str) -> None:
        running = group.start(2, workdir, *args, config=PACKED)
        codes, _, errors = group.finish(running)
        assert codes == [0, 0], errors

    rate = '--config.optimizer.learning_rate'
    steps = (f'{rate}.warmup_steps=2', f'{rate}.decay_steps=40')
    train(whole, *steps)
    train(parts, *steps, '--config.train_for=20steps')
    train(parts, *steps)
    assert command.result(parts)['data_digest'] == command.result(whole)['data_digest']
    ended = command.run(*PACKED, f'--workdir={parts}', *steps, '--config.train_for=60steps')
    assert ended.code == 2
    assert (
        'the checkpoint has 2 processes, and this run 1. Start the run with 2 processes'
        in ended.err
    )
    assert 'Traceback' not in ended.err
