# SPDX-License-Identifier: Apache-2.0
"""Configs as text, their differences, and the default work directory."""

from __future__ import annotations

import pathlib

import pytest

from tests.command import ROOT
from trainer.config import diff, identity, loading, overrides, show
from trainer.config.loading import LoadedConfig

CONFIGS = sorted(p.name for p in (ROOT / 'configs').glob('*.py') if p.name != '__init__.py')


def load(*assignments: tuple[str, str]) -> tuple[LoadedConfig, tuple[overrides.Override, ...]]:
    loaded = loading.load(str(ROOT / 'configs' / 'mnist.py'))
    return loaded, overrides.apply(loaded.config, assignments)


@pytest.mark.parametrize('name', CONFIGS)
def test_golden_text_of_each_config(name: str) -> None:
    """A changed default shows as a diff; to accept it, run tests/config/regenerate.py."""
    loaded = loading.load(str(ROOT / 'configs' / name))
    golden = pathlib.Path(__file__).parent / 'golden' / f'{name.removesuffix(".py")}.txt'
    assert show.format_resolved(loading.to_plain(loaded.config), ()) + '\n' == golden.read_text()


def test_origins() -> None:
    loaded, applied = load(
        ('optimizer', '{"momentum": 0.5}'),
        ('data.device_transforms[0].scale', '2'),
        ('ema.decay', '0.9'),
    )
    text = show.format_resolved(loading.to_plain(loaded.config), applied).splitlines()
    assert 'optimizer.momentum = 0.5  # --config.optimizer={"momentum": 0.5}' in text
    assert 'optimizer.learning_rate = 0.01' in text
    scale = 'data.device_transforms[0].scale'
    assert f'{scale} = 2.0  # --config.{scale}=2' in text
    assert 'ema.decay = 0.9  # --config.ema.decay=0.9' in text
    assert "data.remainder = 'carry'  # default" in text


def test_help_lists_keys_that_the_file_does_not_set() -> None:
    text = show.format_helpconfig(loading.to_plain(load()[0].config))
    for key in ('data.batch_size', 'data.repeat_batch', 'optimizer.clip_norm', 'evals.test.ema'):
        assert f'--config.{key} ' in text


def test_diff() -> None:
    old = {'a': {'b': 1, 'c': (1, 2)}, 'd': 3}
    new = {'a': {'b': 1.0, 'c': (1, 5)}, 'e': 4}
    assert diff.diff(old, new) == [
        diff.Change('a.b', 1, 1.0),
        diff.Change('a.c[1]', 2, 5),
        diff.Change('d', 3, diff.ABSENT),
        diff.Change('e', diff.ABSENT, 4),
    ]
    assert diff.diff(old, old) == []


def test_workdir_names_follow_the_identity() -> None:
    def workdir(*assignments: tuple[str, str]) -> str:
        return identity.default_workdir(*load(*assignments))

    rate, seed = ('optimizer.learning_rate', '0.1'), ('seed', '3')
    assert workdir() == 'runs/mnist'
    assert workdir(('train_for', '5steps'), ('log.every', '1steps')) == 'runs/mnist'
    assert (
        workdir(rate, seed)
        == workdir(seed, rate)
        == 'runs/mnist-optimizer.learning_rate=0.1,seed=3'
    )
    assert workdir(('seed', '1'), seed) == 'runs/mnist-seed=3'
    awkward = {workdir(('data.source.split', text)) for text in ('a b', 'a/b', 'a_b', 'a:b')}
    assert len(awkward) == 4
    long = workdir(('data.source.split', 'x' * 200))
    assert len(long) <= len('runs/') + 100
    assert long != workdir(('data.source.split', 'x' * 201))
