# SPDX-License-Identifier: Apache-2.0
"""Ensembles: half precision, sown values, changed hyperparameters, and errors."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests import command
from tests.ensemble.test_step import RATES, ensemble, experiment, train
from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.ensemble import hyperparams
from trainer.ensemble.step import member_state
from trainer.experiment import load_and_build
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize('steps_per_call', [1, 5])
def test_half_precision_parameters(steps_per_call: int) -> None:
    """Hyperparameters and slots stay float32, so each program compiles once."""
    # With an average of squares and a trace of updates, which the rate is a factor of.
    optimizer = {'target': 'optax:rmsprop', 'learning_rate': 1e-3, 'momentum': 0.5}
    options = {'precision': {'params': 'bfloat16'}, 'steps_per_call': steps_per_call}
    vary = {'optimizer': {'learning_rate': (1e-3, 1e-4), 'decay': (0.999, 0.9)}}
    state, trainer = train(**options, optimizer=optimizer, ensemble=ensemble(**vary))
    program = (
        trainer.set_up().programs.fused if steps_per_call > 1 else trainer.set_up().programs.step
    )
    assert program.compiles == 1
    found = hyperparams.read(state.opt_state, ('learning_rate', 'decay'))
    assert found['decay'].tolist() == pytest.approx([0.999, 0.9], rel=1e-6)
    alone, _ = train(**options, optimizer={**optimizer, 'decay': 0.999})
    slots = [x.dtype for x in jax.tree.leaves(alone.opt_state)]
    mine = [x.dtype for x in jax.tree.leaves(member_state(state, 0).opt_state) if x.ndim]
    assert mine == slots == ['float32'] * len(slots)


@pytest.mark.slow
def test_an_ensemble_is_better_than_its_members() -> None:
    """The mean of five trained members is more accurate than a member on average."""
    path = str(command.ROOT / 'configs' / 'mnist_ensemble.py')
    trainer = Trainer(load_and_build(path, train_for='400 steps', checkpoint__every='never'))
    found = trainer.fit().metrics
    each = [found[f'eval/test/member_{index}/accuracy'] for index in range(5)]
    assert len(set(each)) > 1 and min(each) > 0.8
    assert found['eval/test/members/accuracy'] == pytest.approx(np.mean(each))
    assert found['eval/test/accuracy'] > np.mean(each)
    assert found['eval/test/loss'] < found['eval/test/members/loss']


class Sowing(nn.Module):
    """Sows a number for each example, and the number of its calls."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(10)(x.reshape(x.shape[0], -1))
        self.sow('intermediates', 'square', (y**2).mean(-1))
        self.sow('intermediates', 'calls', 1)
        return y


def squares(model: Any, batch: Any) -> TaskOutput:
    model(batch['image'])
    return TaskOutput(loss=model.intermediates['square'][0])


@pytest.mark.slow
def test_sown_floats_are_averaged() -> None:
    """A task that reads it is evaluated like any other."""
    task = {'ref': f'{__name__}:squares'}
    model = {'target': f'{__name__}:Sowing'}
    state, trainer = train(model=model, task=task, ensemble=ensemble())
    found = trainer.evaluate(state)['test']
    assert found['loss'] == pytest.approx(found['members/loss'], rel=1e-5)
    assert found['member_0/loss'] != pytest.approx(found['member_1/loss'], rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_applies_changed_hyperparameters(tmp_path: pathlib.Path) -> None:
    """With --allow_config_change, a run resumes its weights with other hyperparameters."""

    def trainer(rates: tuple[float, ...], allow: bool = False) -> Trainer:
        made = experiment(ensemble=ensemble(optimizer={'learning_rate': rates}))
        return Trainer(made, str(tmp_path), allow_config_change=allow)

    trainer(RATES).fit(max_steps=3)
    with pytest.raises(UserError, match='has a run with another config'):
        trainer((0.2, 0.02)).fit()
    state = trainer((0.2, 0.02), allow=True).fit().state
    found = hyperparams.read(state.opt_state, ('learning_rate',))['learning_rate']
    assert found.tolist() == pytest.approx([0.2, 0.02])
    rows = command.rows(tmp_path)
    assert rows[-1]['train/member_1/learning_rate'] == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize('metric', ['eval/test/members/loss', 'eval/test/member_1/loss'])
def test_member_metrics_choose_and_stop(metric: str, tmp_path: pathlib.Path) -> None:
    made = experiment(
        ensemble=ensemble(), early_stopping={'metric': metric, 'min_delta': 1e9},
        checkpoint={'best': {'metric': metric, 'mode': 'min'}}, evals__test__every='2 steps',
    )  # fmt: skip
    trainer = Trainer(made, str(tmp_path))
    assert trainer.fit().status == 'stopped_early'
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.best() == trainer.checkpoints.latest()


def test_a_schedule_is_not_replaced() -> None:
    schedule = {
        'target': 'optax:cosine_decay_schedule', 'init_value': 0.1, 'decay_steps': '100%',
    }  # fmt: skip
    vary = {'optimizer': {'learning_rate': RATES}}
    with pytest.raises(UserError, match=r'is not a number but optax:cosine_decay_schedule.*factor'):
        experiment(optimizer={'learning_rate': schedule}, ensemble=ensemble(**vary))


@pytest.mark.parametrize(
    ('optimizer', 'vary', 'who'),
    slow_after(
        1,
        [
            (
                {'nesterov': True},
                {'nesterov': (1, 0)},
                r'config\.optimizer branches in .* nesterov',
            ),
            (
                {'target': 'optax:adafactor'},
                {'min_dim_size_to_factor': (8, 16)},
                r'config\.optimizer branches in Python.* min_dim_size_to_factor',
            ),
        ],
    ),
)
def test_static_hyperparameters_cannot_vary(
    optimizer: dict[str, Any], vary: dict[str, Any], who: str
) -> None:
    made = experiment(optimizer=optimizer, ensemble=ensemble(optimizer=vary))
    with pytest.raises(UserError, match=who):
        Trainer(made).fit()


def test_sharding_rules_cannot_use_the_ensemble_axis() -> None:
    rule = {
        'target': 'trainer.sharding:ByPath',
        'rules': (('Dense_0/kernel', (None, 'ensemble')),),
    }  # fmt: skip
    made = experiment(mesh={'ensemble': 2, 'data': 4}, sharding=(rule,), ensemble=ensemble())
    with pytest.raises(UserError, match=r"mesh axis 'ensemble' is reserved for the members"):
        Trainer(made).init_state()


class Decoding:
    """Measures generated tokens."""

    def __call__(self, model: Any, batch: Any) -> Any:
        return model.greedy(batch['inputs'], batch['lengths'], 4).sum(-1).astype('f4')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'message'),
    [
        # Each member would continue its own tokens.
        ('trainer.tasks:Answer', r'config\.ensemble: the members .* different answers'),
        # The advice fits: `combine` is for the model's own call only.
        (f'{__name__}:Decoding', r'a method or a part .* int32, .* that only calls the'),
    ],
)
def test_generated_tokens_are_not_combined(task: str, message: str) -> None:
    config = str(command.ROOT / 'configs' / 'addition.py')
    evaluated = {'evals__held_out__task': {'target': task}}
    trainer = Trainer(load_and_build(config, ensemble={'size': 2}, **evaluated))
    with pytest.raises(UserError, match=message):
        trainer.set_up().evaluators['held_out'].prepare(trainer.set_up().programs.abstract)
