# SPDX-License-Identifier: Apache-2.0
"""Invalid overrides at every path give a message of bounded length, never a traceback."""

from __future__ import annotations

import contextlib
import pathlib
import random
from typing import Any

import ml_collections
import numpy as np
import pytest

from trainer import experiment
from trainer.config import loading, overrides, schema, show
from trainer.config.errors import UserError, full_text

CONFIG = 'configs/mnist_mlp.py'
MAX_CHARACTERS = 600
PATHS = (
    'train_for', 'model', 'model.features', 'model.activation', 'model.dropout_rate', 'model.args',
    'task', 'task.weight', 'data', 'data.source', 'data.source.split', 'data.batch_size',
    'data.transforms', 'data.device_transforms', 'data.device_transforms[0]', 'data.loader',
    'data.remainder', 'data.seed', 'optimizer', 'optimizer.learning_rate', 'optimizer.momentum',
    'optimizer.clip_norm', 'optimizer.freeze', 'optimizer.groups', 'optimizer.groups.a',
    'optimizer.lr_multipliers', 'optimizer.eval_params', 'seed', 'evals', 'evals.test',
    'evals.test.data', 'evals.test.task', 'evals.new', 'accumulate', 'ensemble', 'ensemble.vary',
    'ensemble.vary.optimizer', 'ema', 'early_stopping', 'mesh', 'mesh.data', 'precision',
    'precision.compute', 'sharding', 'checkpoint', 'checkpoint.best', 'checkpoint.every', 'log',
    'profile', 'capture', 'capture.x', 'guard', 'init_from', 'init_from.rename', 'surgery', 'hooks',
    'hooks.h', 'step', 'vars', 'vars.a', 'steps_per_call', 'no_such_key', 'model.no_such.key',
)  # fmt: skip
VALUES = (
    '{1: 2}', '{None: 1}', '{True: 1}', '{(1, 2): 3}', '{1.5: 2}', '{"a": {1: 2}}', '{"": 1}',
    '{1: 2, "a": 3}', '{"__class__": 1}', '{"a": {"__dict__": 1}}', '[{"__class__": 1}]',
    '({None: 1},)', '{"target": 3}', '{"target": None}', '{"target": {"target": "a:b"}}',
    '{"ref": 1, "target": 2}', '{"ref": "os:system"}', '{"target": "os:getcwd", "ref": "a:b"}',
    '{"target": "math:pi"}', '{"target": "nowhere:X"}', '{"target": "optax:sgd", "args": 5}',
    '{"target": "builtins:dict", "a": 1}', '{"items": 1}', '{"keys": 1, "get": 2}',
    '{"a.b": 1, "a": {"b": 2}}', '{"a": 1, "a.b": 2}', '{".": 1}', '{"a[0]": 1}', '{"a": {}}',
    '{}', '[]', '()', '[[]]', '[1, "a", None]', '((1, 2), 3)', '[{}]', 'null', 'true', '""', '{',
    '{1, 2}', 'b"x"', '1j', '...', '1e400', '-1e400', '[1e400]', 'NaN', '-1', '0',
    '5 steps', '1e-999999999 epochs', '\x00', '\udc80', '🙂',
)  # fmt: skip
LONG_VALUES = (
    '9' * 1000, '0x' + 'f' * 5000, 'x' * 20_000, '{"a": "' + 'x' * 20_000 + '"}',
    '{"' + 'k' * 9000 + '": 1}', '[' * 30 + ']' * 30, '[' * 400 + ']' * 400,
    '{"a":' * 100 + '1' + '}' * 100, '[' * 100_000 + ']' * 100_000, '[' + '1,' * 20_000 + '1]',
    '"' + '\\u0000' * 3000 + '"', '1' + '0' * 400 + ' epochs',
)  # fmt: skip
UNPARSEABLE = (
    '', '.', 'a..b', '[0]', 'model[0]', 'mesh[0]', 'evals[0].data', 'hooks[-1]', '__class__',
    'model.__class__', 'mesh.__dict__', 'vars.__init__.x', 'hooks.__call__', 'x' * 9000,
    'model' + '.x' * 3000, 'model' + '.features' * 60, 'ensemble.vary' + '.a' * 40,
    'data.transforms[' + '9' * 5000 + ']', 'data.device_transforms[-99]', 'model.features[5].x',
    'optimizer.learning_rate.x.y', 'seed.x', 'evals.test.data.source.split.x', '\udc80', 'a b',
)  # fmt: skip


def raises_user_error(assignments: list[tuple[str, str]], *, then: Any = None) -> bool:
    """Whether the overrides raise a UserError; any other exception fails the test."""
    config = loading.load(CONFIG)
    try:
        overrides.apply(config.config, assignments)
        schema.read(loading.to_plain(config.config))
        if then is not None:
            then(config)
    except UserError as error:
        text = str(error)
        assert 0 < len(text) <= MAX_CHARACTERS, (len(text), text[:300])
        return True
    return False


@pytest.mark.slow
def test_every_path() -> None:
    """Each path with a third of the values, so that each value is tried at 20 paths or more."""
    chosen = random.Random(0)
    pairs = [(path, value) for path in PATHS for value in chosen.sample(VALUES, len(VALUES) // 3)]
    refusals = sum(raises_user_error([pair]) for pair in pairs)
    assert refusals > len(pairs) * 3 // 4


@pytest.mark.slow
def test_long_and_deep_values() -> None:
    chosen = random.Random(0).sample(PATHS, 10)
    for path in ('data.source.split', 'vars', 'hooks', 'task.weight', *chosen):
        for value in LONG_VALUES:
            raises_user_error([(path, value)])


def test_invalid_paths() -> None:
    for path in UNPARSEABLE:
        for value in ('1', '{"a": 1}', '{1: 2}', '{"target": "optax:sgd"}'):
            raises_user_error([(path, value)])


@pytest.mark.parametrize('seed', [0, 1])
def test_several_overrides_together(seed: int) -> None:
    chosen = random.Random(seed)
    for _ in range(100):
        count = chosen.randint(2, 3)
        raises_user_error([(chosen.choice(PATHS), chosen.choice(VALUES)) for _ in range(count)])


def test_a_line_with_a_long_value_is_shortened() -> None:
    """In the text and the notes of any error."""
    error = UserError('first\n' + 'x' * 20_000 + '\nlast')
    error.add_note('y' * 20_000)
    text = full_text(error)
    assert text.startswith('first\nxxx') and '\nlast\nyyy' in text
    assert len(text) < 5000


def test_listings_of_a_config_with_an_invalid_section() -> None:
    """`--helpconfig` and the hints read the config before it is checked."""
    for path in PATHS:
        for value in ('{"a": 1}', '{"ref": 1, "target": 2}', '{"a": {"b": [3]}}'):
            config = loading.load(CONFIG)
            with contextlib.suppress(UserError):
                overrides.apply(config.config, [(path, value)])
                assert 'train_for' in show.format_helpconfig(loading.to_plain(config.config))
                overrides.apply(config.config, [('no_such_key', '1')])


@pytest.mark.slow
def test_accepted_values_build_or_raise_user_errors() -> None:
    """Checks a sample of all pairs of a path and a value."""
    pairs = [(path, value) for path in PATHS for value in (*VALUES, *LONG_VALUES)]
    accepted = [
        pair for pair in random.Random(0).sample(pairs, 500) if not raises_user_error([pair])
    ]
    assert len(accepted) > 20
    for pair in accepted:
        raises_user_error([pair], then=experiment.build)


@pytest.mark.parametrize(
    'value',
    [
        {1: 2},
        {None: 1},
        {'__class__': 1},
        {(1, 2): 3},
        [{True: 1}],
        float('inf'),
        {1, 2},
        b'x',
        lambda: 1,
        object(),
        10**400,
    ],
)
def test_from_python(value: Any) -> None:
    for key in ('model', 'seed', 'mesh', 'evals', 'data__loader', 'optimizer__groups'):
        with pytest.raises(UserError):
            experiment.load_and_build(CONFIG, **{key: value})


def test_numpy_numbers_and_paths_from_python() -> None:
    values = {'optimizer__learning_rate': np.float32(0.5), 'seed': np.int64(3)}
    built = experiment.load_and_build(CONFIG, **values)
    assert built.origin.config['optimizer']['learning_rate'] == 0.5
    assert type(built.origin.config['optimizer']['learning_rate']) is float
    assert built.origin.config['seed'] == 3
    path = pathlib.Path('runs') / 'a'
    built = experiment.load_and_build(CONFIG, init_from__path=path)
    assert built.origin.config['init_from'] == {'path': 'runs/a'}
    part = ml_collections.ConfigDict(dict(momentum=0.5))
    built = experiment.load_and_build(CONFIG, optimizer=part)
    assert built.origin.config['optimizer']['momentum'] == 0.5


def test_a_config_built_in_python() -> None:
    for path, value in ((), None), ((), {1: 2}), (('model',), {1: 2}), (('evals',), {1: {}}):
        config = loading.load(CONFIG)
        node = config.config
        for key in path:
            node = node[key]
        with node.unlocked(), node.ignore_type():
            node[3] = value
        with pytest.raises(UserError):
            experiment.build(config)
