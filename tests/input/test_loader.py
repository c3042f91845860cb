# SPDX-License-Identifier: Apache-2.0
"""The loader protocols: the documented example trains, ours conform, violations are named."""

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
from tests.step import tiny
from trainer.config.errors import UserError
from trainer.config.loading import LoadedConfig
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import Block, EvalLoader, TrainLoader
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


class Whole:
    """A loader with all required attributes and no more; tests remove some."""

    examples = 8
    steps_per_epoch = 2

    def __init__(
        self, *, source: Any = None, batch_size: int = 4, transforms: Any = (), seed: int = 0,
        shuffle: bool = True, remainder: str = 'carry', repeat_batch: int | None = None,
    ):  # fmt: skip
        self.spec = {'x': np.zeros((4, 1), np.float32)}

    def block(self, start: int, count: int, rows: Any = slice(None)) -> Block:
        ids = (np.arange(start, start + count)[:, None] * 4 + np.arange(4)) % 8
        return Block({'x': ids[:, rows, None].astype(np.float32)}, ids[:, rows])


class Wrapping:
    """Forwards every attribute to another loader."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_optional_parts_may_be_missing() -> None:
    data = TrainData.from_loader(Whole(), 'config.data.loader')
    assert (data.is_stream, data.marks, data.with_first) == (False, (), None)
    assert data.first_example()['x'].tolist() == [[0]]
    data.restore(3, None)
    data.close()
    assert data.block(1, 1).states is None
    with pytest.raises(UserError, match=r'Whole cannot resume a run whose batch size was 2'):
        data.with_batch_sizes(((0, 2), (5, 4)))


def test_a_loader_that_forwards_its_attributes() -> None:
    data = TrainData.from_loader(Wrapping(TRAIN['TrainLoader']()), 'config.data.loader')
    assert data.with_first is not None and not data.is_stream
    with pytest.raises(UserError, match='Wrapping has no `examples`'):
        TrainData.from_loader(Wrapping(remove_attribute('examples')), 'config.data.loader')


def test_a_property_is_not_evaluated_by_the_check() -> None:
    class Reading(Whole):
        @property
        def first(self) -> Any:
            raise AssertionError('reads data')

    assert TrainData.from_loader(Reading(), 'config.data.loader').with_first is not None


class NoRows(Whole):
    def block(self, start: int, count: int) -> Block:  # type: ignore[override]
        return super().block(start, count)


class OneArgument(Whole):
    def restore(self, state: Any) -> None: ...


class NoMarks(Whole):
    def after(self, batch_sizes: Any) -> Any:
        return self


class NoMethod(Whole):
    close = True


def remove_attribute(name: str) -> Any:
    kept = {k: v for k, v in vars(Whole).items() if k not in (name, '__dict__', '__weakref__')}
    return type('Part', (), kept)()


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        *((remove_attribute(n), f'Part has no `{n}`; this loader needs examples, steps_per_epoch')
          for n in ('examples', 'steps_per_epoch', 'block')),
        (object(), 'object has no `examples`, `steps_per_epoch`, `spec`, `block`; this loader'),
        (NoRows(), r'NoRows.block cannot be called as block\(start, count, rows=slice\(None\)\)'),
        (OneArgument(), r'OneArgument.restore cannot be called as restore\(position, state\)'),
        (NoMarks(), 'NoMarks has `after` but no `marks`; see '),
        (NoMethod(), r'NoMethod.close cannot be called as close\(\)'),
    ],
)  # fmt: skip
def test_violations_of_the_protocol_are_named(loader: Any, message: str) -> None:
    with pytest.raises(UserError, match=f'^config.data.loader: {message}'):
        TrainData.from_loader(loader, 'config.data.loader')


def test_a_training_loader_is_refused_for_evaluation() -> None:
    expected = 'TrainLoader has no `num_batches`, `rows`; .*: see trainer.input.loader.EvalLoader'
    with pytest.raises(UserError, match=expected):
        EvalData.from_loader(TRAIN['TrainLoader'](), 'config.evals.test.data.loader')


def test_the_check_runs_when_the_config_is_built() -> None:
    data = {'source': tiny.SOURCE, 'batch_size': 32, 'loader': {'target': f'{__name__}:NoRows'}}
    with pytest.raises(UserError, match=r'config\.data\.loader: NoRows\.block cannot be called'):
        tiny.trainer(data=data)


def test_no_other_file_checks_optional_parts() -> None:
    """Optional parts are checked in `trainer.input.data` alone."""
    abilities = '|'.join(('restore', 'first', 'close', 'after', 'marks', 'states', 'block'))
    asks = re.compile(rf"(hasattr|getattr(_static)?)\([^)]*'({abilities})'")
    files = [p for p in (ROOT / 'trainer').rglob('*.py') if 'bundled' not in p.parts]
    # A score may have `close` too: see `is_streaming`.
    files = [p for p in files if p.name != 'score.py']
    found = [str(p) for p in files if asks.search(p.read_text())]
    assert found == [] and len(files) > 100
