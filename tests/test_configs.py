# SPDX-License-Identifier: Apache-2.0
"""Every config documents how to run it and what to expect, is on a page, and runs."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from tests import pages
from tests.command import ROOT
from trainer.config import loading, schema
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != '__init__')

MNIST = {'data__source__limit': 64, 'evals__test__data__source__limit': 20}
# What makes two steps of each one short: a new config belongs here, too.
SHORT: dict[str, dict[str, Any]] = {
    'addition': {
        f'evals__{name}__data__source__count': 20 for name in ('held_out', 'teacher_forced')
    },
    'lm_packed': {'model__layers': 1, 'evals': {}},
    'karate': {'data__batch_size': 8},  # One graph for each device.
    'mnist': MNIST,
    'mnist_ensemble': MNIST,
    'mnist_mlp': MNIST,
    'mnist_nnx': MNIST,
    'mnist_resnet': {
        **MNIST,
        'data__batch_size': 16,
        'evals__test_ema__data__source__limit': 20,
    },
    'molecules': {
        'model__width': 8,
        'model__rounds': 1,
        'data__source__num_shapes': 1,
        **{f'evals__{split}__data__source__items__limit': 20 for split in ('dev', 'test')},
    },
    'sentiment': {
        'model__hidden': 8,
        'model__width': 8,
        'vars__limit': 64,
        **{f'evals__{split}__data__source__items__texts__limit': 64 for split in ('dev', 'test')},
        **{
            f'{data}__source__lengths': (64,)
            for data in ('data', 'evals__dev__data', 'evals__test__data')
        },
    },
    'tagging': {
        'model__hidden': 8,
        **{f'evals__{split}__data__source__items__limit': 20 for split in ('dev', 'test')},
    },
    'vae': MNIST,
}


# Not among the quick tests, some of which train `vae` and `sentiment`.
LONG = {
    'addition', 'karate', 'lm_packed', 'mnist', 'molecules', 'mnist_ensemble', 'mnist_resnet',
    'sentiment', 'tagging', 'vae',
}  # fmt: skip

# Those that need weights or data from elsewhere, or other checks, and the test that runs them.
ELSEWHERE = {
    'docstrings': 'weights/test_finetune.py',
    'imagenet': 'examples/test_imagenet.py',
    'lm': 'examples/test_lm.py',
    'ppo': 'examples/test_ppo.py',  # Its loss may be negative.
    'tfds_mnist': 'examples/test_tfds_mnist.py',
    'vit': 'examples/test_vit.py',
    'wmt': 'examples/test_wmt.py',
}


def description(name: str) -> str:
    tree = ast.parse((ROOT / 'configs' / f'{name}.py').read_text())
    return ast.get_docstring(tree) or ''


# The table of configs, and the one of their results.
ROWS = pages.table('config', 'what it trains')
RESULTS = pages.table('config', 'result', 'time', 'measured')


def test_each_config_has_a_row() -> None:
    assert sorted(name for name, *_ in ROWS) == NAMES
    assert sorted({_parts(config)[0] for config, *_ in RESULTS}) == NAMES


@pytest.mark.parametrize(('name', 'trains', 'arguments'), ROWS)
def test_the_command_is_that_of_the_docstring(name: str, trains: str, arguments: str) -> None:
    """The command is that of the docstring."""
    assert trains
    arguments = arguments.strip('`')
    assert arguments.startswith(f'--config=configs/{name}.py')
    assert f'python -m trainer.main {arguments}' in ' '.join(description(name).split())


@pytest.mark.parametrize(('config', 'result', 'time', 'day'), RESULTS)
def test_the_results_are_those_of_the_docstring(
    config: str, result: str, time: str, day: str
) -> None:
    """The figure and the time are those of the docstring."""
    name, words = _parts(config)
    text = ' '.join(description(name).split())
    if result == 'not run yet':
        assert (time, day) == ('', '') and 'not run yet' in text
        return
    # A config with variants has a sentence for each.
    expected = text.split(f'`{words}`: ' if words else 'Expected after ')[1]
    figure = re.match(
        r'[\d.]+( %| nats| bits| per word| BLEU| AUC| squared error| steps per)', result
    )
    # A docstring may round: 'about 88 %' for 88.2 %.
    assert figure is not None
    assert figure[0] in expected or f'about {round(float(figure[0].split()[0]))} %' in expected
    assert time.removesuffix(', busy') in expected
    assert (', busy' in time) == ('busy CPU cores' in expected)
    assert re.fullmatch(r'20\d\d-\d\d-\d\d', day)


def _parts(config: str) -> tuple[str, str]:
    """Returns the name of a config and its words, ':tiny' or '', for a cell of the table."""
    match = re.fullmatch(r'`configs/(\w+)\.py((?::[\w,]+)?)`', config)
    assert match is not None, config
    return match[1], match[2]


@pytest.mark.parametrize('name', NAMES)
def test_every_key_is_read(name: str) -> None:
    config = loading.to_plain(loading.load(str(ROOT / 'configs' / f'{name}.py')).config)
    assert schema.read(config).train_for is not None


def test_each_config_is_run() -> None:
    assert set(SHORT) | set(ELSEWHERE) == set(NAMES)
    for name, test in ELSEWHERE.items():
        assert re.search(rf"'{name}(\.py)?'", (ROOT / 'tests' / test).read_text())


@pytest.mark.parametrize(
    'name', [pytest.param(x, marks=pytest.mark.slow if x in LONG else ()) for x in SHORT]
)
def test_the_config_trains_and_evaluates(name: str) -> None:
    short = {'train_for': '2 steps', 'log__every': '1 steps', **SHORT[name]}
    result = Trainer(load_and_build(str(ROOT / 'configs' / f'{name}.py'), **short)).fit()
    assert (result.status, result.step) == ('finished', 2)
    assert result.metrics['train/loss'] > 0
    evaluated = [key for key in result.metrics if key.startswith('eval/')]
    assert bool(evaluated) == ('evals' not in short)
