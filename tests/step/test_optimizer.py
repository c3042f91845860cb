# SPDX-License-Identifier: Apache-2.0
"""Clipping, masks, freezing, multipliers and learning rates around the optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.command import ROOT
from tests.marks import slow_except
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.step.optimizer import Optimizer, RegexMask

PARAMS = {
    'backbone': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
    'head': {'kernel': jnp.ones((3, 1)), 'bias': jnp.ones(1)},
}
GRADS = jax.tree.map(lambda x: 3.0 * x, PARAMS)


def updates(optimizer: Optimizer, steps: int = 1) -> tuple[Any, Any]:
    tx = optimizer.transformation(PARAMS)
    state, new = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        out, state = tx.update(GRADS, state, new)
        new = optax.apply_updates(new, out)
    return new, state


def updates_without_gradients(optimizer: Optimizer) -> tuple[Any, Any]:
    """Returns the parameters after one update with gradients of 0, and the state."""
    tx = optimizer.transformation(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    out, state = tx.update(zeros, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, out), state


@pytest.mark.parametrize('norm', [0.0, -1.0, float('nan')])
def test_clip_norm_must_be_positive(norm: float) -> None:
    """0 would train nothing, and a negative norm would reverse the gradient."""
    with pytest.raises(UserError, match=r'config\.optimizer\.clip_norm: expected more than 0'):
        Optimizer(base=optax.sgd(1.0), clip_norm=norm)


def test_clipping_uses_the_global_norm() -> None:
    """Gradients above the limit are scaled by one factor; others are unchanged."""
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(GRADS)))
    new, _ = updates(Optimizer(base=optax.sgd(1.0), clip_norm=0.5))
    jax.tree.map(
        lambda p, g, n: np.testing.assert_allclose(n, p - g * 0.5 / norm, rtol=1e-6),
        PARAMS, GRADS, new,
    )  # fmt: skip
    loose, _ = updates(Optimizer(base=optax.sgd(1.0), clip_norm=1e6))
    jax.tree.map(lambda p, g, n: np.testing.assert_array_equal(n, p - g), PARAMS, GRADS, loose)


def test_frozen_parameters_do_not_change_and_have_no_state() -> None:
    """Bit-identical after training, no slots, and clipping sees the trained ones only."""
    optimizer = Optimizer(base=optax.adam(0.1), freeze=('backbone/.*',), clip_norm=1.0)
    new, state = updates(optimizer, steps=5)
    jax.tree.map(np.testing.assert_array_equal, new['backbone'], PARAMS['backbone'])
    assert (new['head']['kernel'] != PARAMS['head']['kernel']).all()
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == 2 * (3 + 1) + 1  # Adam's two moments of the head, and its count
    assert sum(jax.tree.leaves(optimizer.frozen_mask(PARAMS))) == len(
        jax.tree.leaves(PARAMS['backbone'])
    )


def test_multipliers_scale_the_learning_rate() -> None:
    """Equal to two optimizers with different rates."""
    pairs = (('.*/bias', 0.1), ('head/.*', 2.0), ('.*', 1.0))
    new, _ = updates(Optimizer(base=optax.sgd(0.5, momentum=0.9), lr_multipliers=pairs), steps=3)
    for rate, place in ((0.05, 'bias'), (0.5, 'kernel')):
        expected, _ = updates(Optimizer(base=optax.sgd(rate, momentum=0.9)), steps=3)
        np.testing.assert_allclose(new['backbone'][place], expected['backbone'][place], rtol=1e-6)
    doubled, _ = updates(Optimizer(base=optax.sgd(1.0, momentum=0.9)), steps=3)
    np.testing.assert_allclose(new['head']['kernel'], doubled['head']['kernel'], rtol=1e-6)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'freeze': ('nothing/.*',)}, "pattern 'nothing/.*' matches no parameter"),
        ({'lr_multipliers': (('head/.*', 2.0),)}, 'no pattern matches backbone/bias'),
        ({'lr_multipliers': (('.*', 1.0), ('neck', 1.0))}, "'neck' matches no parameter"),
        ({'decay_mask': ('kernel', 'neck/.*')}, "decay_mask: 'kernel', 'neck/.*' match no param"),
        ({'decay_mask': ('*kernel',)}, "'*kernel' is not a regular expression: nothing to repeat"),
    ],
)
def test_patterns_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace('*', r'\*')):
        Optimizer(base=optax.sgd(0.1), **options).transformation(PARAMS)


def test_single_pattern_of_a_decay_mask_may_match_nothing() -> None:
    mask = ('neck/.*', 'head/kernel')
    Optimizer(base=optax.sgd(0.1), decay_mask=mask).transformation(PARAMS)


def test_decay_mask() -> None:
    """No decay on biases, as optax's own mask does it."""
    mask = RegexMask(('.*/kernel',))
    assert mask(PARAMS)['head'] == {'kernel': True, 'bias': False}
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'),
        optimizer__target='optax:adamw',
        optimizer__weight_decay=0.5,
        optimizer__decay_mask='.*/kernel',
    )  # fmt: skip
    tx = experiment.optimizer.transformation(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    out, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(out['head']['bias'], 0.0)
    np.testing.assert_allclose(out['head']['kernel'], -0.01 * 0.5, rtol=1e-6)


ADAMW = {'target': 'optax:adamw', 'learning_rate': 0.1, 'weight_decay': 0.5}
MASKED: dict[str, dict[str, Any]] = {
    'adadelta': {'target': 'optax:adadelta', 'learning_rate': 0.1, 'weight_decay': 0.5},
    'adafactor': {'target': 'optax:adafactor', 'learning_rate': 0.1, 'weight_decay_rate': 0.5},
    'lars': {'target': 'optax:lars', 'learning_rate': 0.1, 'weight_decay': 0.5},
    'lion': {'target': 'optax:lion', 'learning_rate': 0.1, 'weight_decay': 0.5},
    'muon': {'target': 'optax.contrib:muon', 'learning_rate': 0.1, 'weight_decay': 0.5},
    'galore': {'target': 'optax.contrib:galore', 'learning_rate': 0.1, 'weight_decay': 0.5,
               'rank': 1},
    'within a chain': {'target': 'optax:chain', 'args': ({'target': 'optax:clip', 'max_delta': 1.0},
                                                         ADAMW)},
    'within a wrapper': {'target': 'optax:apply_if_finite', 'inner': ADAMW,
                         'max_consecutive_errors': 3},
}  # fmt: skip


@pytest.mark.parametrize(
    'name',
    slow_except(['adadelta', 'adafactor', 'within a chain', 'within a wrapper'], MASKED),
)
def test_decay_masks_with_other_argument_names(name: str) -> None:
    """A mask of one kernel; without gradients, a parameter that changes has decayed."""
    path = str(ROOT / 'configs' / 'mnist_mlp.py')
    node = {**MASKED[name], 'decay_mask': 'head/kernel'}
    new, _ = updates_without_gradients(load_and_build(path, optimizer=repr(node)).optimizer)
    assert (new['head']['kernel'] < PARAMS['head']['kernel']).all()
    for same in (('head', 'bias'), ('backbone', 'kernel'), ('backbone', 'bias')):
        np.testing.assert_array_equal(new[same[0]][same[1]], PARAMS[same[0]][same[1]])


def test_every_optimizer_of_optax_that_takes_a_decay_mask_is_known() -> None:
    """The argument has one of the two names, or it masks something else."""
    other = {'masked', 'freeze'}
    for module in (optax, optax.contrib):
        for name, made in vars(module).items():
            if not inspect.isfunction(made):
                continue
            known = inspect.signature(made).parameters
            masks = {each for each in known if each.endswith('mask')} - {'trust_ratio_mask'}
            if masks and any('weight_decay' in each for each in known):
                assert masks <= {'mask', 'weight_decay_mask'}, name
            elif 'mask' in masks:
                assert name in other, name


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        ({'target': 'optax:sgd'}, r'optax:sgd has no weight decay to mask'),
        (
            {'target': 'optax.contrib:prodigy'},
            r'weight_decay applies to all parameters. Use two groups',
        ),
        ({**ADAMW, 'mask': None}, r'decay_mask and config\.optimizer\.mask both'),
        (
            {'target': 'optax.contrib:muon', 'adam_weight_decay': 0.1},
            r'adam_weight_decay: optax\.contrib:muon masks the weight decay of its matrices only',
        ),
        (
            {'target': 'optax:masked', 'inner': {'target': 'optax:sgd', 'learning_rate': 0.1},
             'mask': {'ref': 'tests.step.perceptron:kernels'}},
            r'optax:masked has no weight decay to mask',
        ),
    ],
)  # fmt: skip
def test_invalid_decay_masks_are_rejected(node: dict[str, Any], message: str) -> None:
    node = {**node, 'decay_mask': '.*/kernel'}
    if node['target'] != 'optax:masked':
        node.setdefault('learning_rate', 0.1)
    with pytest.raises(UserError, match=message):
        load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), optimizer=repr(node))


def test_decay_mask_without_decay_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    node = {'target': 'optax:adafactor', 'learning_rate': 0.1, 'decay_mask': '.*/kernel'}
    load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), optimizer=repr(node))
    assert 'decay_mask has no effect: config.optimizer.weight_decay_rate is not set' in caplog.text


@pytest.mark.parametrize(
    ('node', 'rates'),
    [
        ('0.25', [0.25, 0.25]),
        (
            '{"target": "optax:warmup_cosine_decay_schedule", "init_value": 0.0, '
            '"peak_value": 1.0, "warmup_steps": "1 epoch", "decay_steps": "100%"}',
            [0.0, 0.2],
        ),
    ],
)
def test_learning_rates_with_durations(node: str, rates: list[float]) -> None:
    """10 epochs of 5 steps."""
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'),
        data__source__limit=160, optimizer__learning_rate=node,
    )  # fmt: skip
    schedule = experiment.optimizer.learning_rate
    assert schedule is not None
    assert [float(schedule(step)) for step in (0, 1)] == pytest.approx(rates)
    if experiment.origin.schedule_steps:
        assert experiment.origin.schedule_steps == {
            'config.optimizer.learning_rate.warmup_steps': 5,
            'config.optimizer.learning_rate.decay_steps': 50,
        }
        assert float(schedule(50)) == pytest.approx(0.0, abs=1e-7)


def test_learning_rate_of_a_chain_is_logged() -> None:
    """A chain of building blocks equals its alias."""
    chain = {
        'target': 'optax:chain',
        'args': (
            {'target': 'optax:trace', 'decay': 0.9},
            {'target': 'optax:scale_by_learning_rate', 'learning_rate': 0.3},
        ),
    }
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'),
        optimizer=repr(chain),
        log__learning_rates=('args[1].learning_rate',),
    )
    assert experiment.optimizer.learning_rate is not None
    assert experiment.optimizer.learning_rate(7) == 0.3
    new, _ = updates(experiment.optimizer, steps=10)
    alias, _ = updates(Optimizer(base=optax.sgd(0.3, momentum=0.9)), steps=10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, alias)


def test_schedule_inside_a_chain_is_logged() -> None:
    """The schedule stays in the chain, and is logged."""
    schedule = {
        'target': 'optax:linear_schedule', 'init_value': 0.4, 'end_value': 0.0,
        'transition_steps': 4,
    }  # fmt: skip
    part = {'target': 'optax:scale_by_learning_rate', 'learning_rate': schedule}
    chain = {'target': 'optax:chain', 'args': ({'target': 'optax:trace', 'decay': 0.9}, part)}
    logged = {'log__learning_rates': ('args[1].learning_rate',)}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    made = load_and_build(config, optimizer=repr(chain), **logged).optimizer
    assert made.learning_rate is not None
    assert [float(made.learning_rate(step)) for step in (0, 2)] == pytest.approx([0.4, 0.2])
    new, _ = updates(made, steps=3)
    alias, _ = updates(Optimizer(base=optax.sgd(made.learning_rate, momentum=0.9)), steps=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, alias)
