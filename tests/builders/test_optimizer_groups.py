# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters from a config: a run, its rows, and invalid configs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.command import CLOCK, ROOT
from tests.step import gan
from tests.step.test_groups import GEN, group, programs, two_players
from trainer.config import loading, show
from trainer.config.errors import UserError
from trainer.experiment import Experiment, build, load_and_build
from trainer.step.optimizer import Optimizer
from trainer.tasks import TaskOutput
from trainer.tasks.runner import TaskRunner
from trainer.trainer import Trainer

CONFIG = str(ROOT / 'tests' / 'step' / 'gan.py')
MNIST = str(ROOT / 'configs' / 'mnist_mlp.py')


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in lines]


@pytest.mark.slow
def test_resume_with_groups_is_bit_equal(tmp_path: pathlib.Path) -> None:
    whole = Trainer(load_and_build(CONFIG), str(tmp_path / 'whole')).fit()
    Trainer(load_and_build(CONFIG), str(tmp_path / 'cut')).fit(max_steps=33)
    cut = Trainer(load_and_build(CONFIG), str(tmp_path / 'cut')).fit()
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(whole.state), jax.device_get(cut.state)
    )
    assert rows(tmp_path / 'whole') == rows(tmp_path / 'cut')
    logged = next(row for row in rows(tmp_path / 'cut') if row['step'] == 30)
    assert {'train/gen_loss', 'train/disc_loss', 'train/distance', 'train/grad_norm'} <= set(logged)
    assert 'train/loss' not in logged
    # The rate of the 30th update of 60: schedules count the 29 before it.
    assert logged['train/learning_rate/gen'] == pytest.approx(0.01 * 31 / 60)
    assert logged['train/learning_rate/disc'] == pytest.approx(0.1)
    assert {'eval/test/gen_loss', 'eval/test/disc_loss'} <= set(cut.metrics)


def build_with(**optimizer: Any) -> Experiment:
    loaded = loading.load(MNIST)
    loaded.config.optimizer = ml_collections.ConfigDict(optimizer)
    loaded.config.train_for = '200 steps'
    return build(loaded)


@pytest.mark.slow
def test_durations_masks_and_patterns_inside_a_group() -> None:
    groups = {
        'kernels': {
            'target': 'optax:adamw',
            'params': '.*/kernel',
            'decay_mask': 'Dense_0/.*',
            'clip_norm': 1,
            'weight_decay': 0.5,
            'learning_rate': {
                'target': 'optax:linear_schedule',
                'init_value': 1.0,
                'end_value': 0.0,
                'transition_steps': '50%',
            },
        },
        'rest': {'target': 'optax:sgd', 'params': ('.*/bias',), 'learning_rate': 0.1},
    }
    experiment = build_with(groups=groups)
    path = 'config.optimizer.groups.kernels.learning_rate.transition_steps'
    assert experiment.origin.schedule_steps == {path: 100}
    optimizer = experiment.optimizer
    assert optimizer.groups['kernels'].optimizer.clip_norm == 1.0
    params = {f'Dense_{i}': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)} for i in range(2)}
    tx = optimizer.transformation(params)
    out, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(out['Dense_0']['kernel'], -0.5, rtol=1e-6)
    for leaf in (out['Dense_1']['kernel'], out['Dense_0']['bias'], out['Dense_1']['bias']):
        np.testing.assert_array_equal(leaf, 0.0)


SGD = {'target': 'optax:sgd', 'learning_rate': 0.1, 'params': '.*'}


@pytest.mark.parametrize(
    ('optimizer', 'message'),
    [
        ({'groups': {'a': SGD}, 'target': 'optax:adam'}, 'config.optimizer.target: with '),
        ({'groups': {'a': SGD}, 'decay_mask': '.*'}, 'belongs there, as in .*groups.a.decay_mask'),
        ({'groups': {'a': {'params': '.*'}}}, 'config.optimizer.groups.a.target is missing'),
        ({'groups': {'a': {'target': 'optax:sgd', 'learning_rate': 1.0}}}, 'a.params is missing'),
        ({'groups': {'a': {**SGD, 'momentun': 0.9}}}, 'Did you mean .*groups.a.momentum?'),
        ({'groups': {'a': {**SGD, 'decay_mask': '.*'}}}, 'groups.a.decay_mask: optax:sgd has no'),
        ({'groups': {'a': {**SGD, 'loss': 3}}}, 'groups.a.loss: expected'),
    ],
)
def test_invalid_configs_of_groups_are_rejected(optimizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_with(**optimizer)


def test_command_line_overrides_a_group() -> None:
    experiment = load_and_build(
        CONFIG,
        optimizer__groups__disc__learning_rate=0.5,
        optimizer__groups__disc__clip_norm=2,
        optimizer__groups__gen__learning_rate__transition_steps='10 steps',
    )
    disc = experiment.optimizer.groups['disc'].optimizer
    assert disc.learning_rate is not None and disc.learning_rate(0) == 0.5
    assert disc.clip_norm == 2.0
    assert list(experiment.origin.schedule_steps.values()) == [10]


def no_loss(model: Any, batch: Any) -> jax.Array:
    return gan.task(model, batch).loss['gen']


@pytest.mark.parametrize(
    ('optimizer', 'task', 'message'),
    [
        (Optimizer(base=GEN), gan.task, r'the losses gen, disc, but config.optimizer.groups does'),
        (
            Optimizer(groups={'all': group('.*', GEN, 'gen')}), gan.task,
            "returns the loss 'disc', but no entry of config.optimizer.groups names it",
        ),
        (
            Optimizer(groups={'gen': group('generator/.*', GEN, 'gen')}), gan.task,
            r'In none: discriminator/Dense_0/bias, .*\n.*or list parameters that should not change',
        ),
        (
            Optimizer(groups={'all': group('.*', GEN)}), gan.task,
            'groups.all.loss is missing; the task returns gen, disc',
        ),
        (two_players(), no_loss, r"the task has no loss 'gen'; it returns one without a name"),
        (
            Optimizer(groups={'all': group('nothing', GEN)}), gan.task,
            "groups.all.params: the pattern 'nothing' matches no parameter",
        ),
        (
            Optimizer(groups={'all': group('(', GEN)}), gan.task,
            r"groups.all.params: '\(' is not a regular expression",
        ),
        (
            Optimizer(groups={
                'all': group('.*', GEN, path='config.optimizer.groups.all',
                             lr_multipliers=(('generator/.*', 1.0),)),
            }), gan.task,
            'config.optimizer.groups.all.lr_multipliers: no pattern matches discriminator',
        ),
    ],
)  # fmt: skip
def test_invalid_groups_are_rejected(optimizer: Optimizer, task: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        programs(optimizer, task=task)


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        (TaskOutput(loss={}), 'empty dict of losses'),
        (TaskOutput(loss={'a/b': jnp.ones(2)}), "names a loss 'a/b'"),
        (TaskOutput(loss={'metrics': jnp.ones(2)}), "other than 'metrics'"),
        (TaskOutput(loss={'a': jnp.ones(2)}, weights={'b': jnp.ones(2)}), 'the losses a'),
        (TaskOutput(loss=jnp.ones(2), weights={'b': jnp.ones(2)}), 'no losses'),
    ],
)
def test_invalid_names_of_losses_are_rejected(output: TaskOutput, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskRunner.from_task(lambda model, batch: output)(None, {})


def test_help_lists_the_unset_keys_of_a_group() -> None:
    text = show.format_helpconfig(loading.to_plain(loading.load(CONFIG).config))
    for key in ('gen.clip_norm', 'disc.decay_mask', 'disc.lr_multipliers'):
        assert f'--config.optimizer.groups.{key}' in text


def one_named_loss(model: Any, batch: Any) -> dict[str, Any]:
    """A task with one named loss, whose name is that of an unnamed loss."""
    return {'loss': -jax.nn.log_softmax(model(batch['image']))[:, 0]}


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
def test_single_named_loss_is_a_scalar_for_its_optimizer(accumulate: int) -> None:
    target = 'optax.contrib:reduce_on_plateau'
    chain = {'target': 'optax:chain', 'args': ({'target': 'optax:sgd', 'learning_rate': 0.1},
             {'target': target})}  # fmt: skip
    loaded = loading.load(MNIST)
    config = loaded.config
    group = {'params': '.*', 'loss': 'loss', **chain}
    config.optimizer = ml_collections.ConfigDict({'groups': {'all': group}})
    config.task = ml_collections.ConfigDict({'ref': f'{__name__}:one_named_loss'})
    config.accumulate, config.train_for = accumulate, '4 steps'
    config.evals = ml_collections.ConfigDict()
    result = Trainer(build(loaded)).fit()
    assert (result.status, result.step) == ('finished', 4)
