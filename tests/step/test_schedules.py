# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules from a config: those of optax, of Flax, and of this project."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import lr_schedule

from tests import command
from trainer.builders.optimizer import build_optimizer
from trainer.config.durations import Clock
from trainer.config.errors import UserError
from trainer.config.sections import GroupSection, OptimizerSection
from trainer.experiment import load_and_build
from trainer.step import schedules
from trainer.step.optimizer import Optimizer
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'mnist_mlp.py')
# Ten epochs of five steps.
SMALL = {'data__source__limit': 160, 'evals': {}, 'checkpoint__every': 'never'}
STEPS = (0, 1, 4, 5, 9, 10, 24, 25, 30, 49)

Schedule = Callable[[Any], Any]


def from_config(node: Mapping[str, Any]) -> Schedule:
    made = load_and_build(CONFIG, optimizer__learning_rate=dict(node), **SMALL)
    assert callable(made.optimizer.learning_rate)
    return made.optimizer.learning_rate


def assert_same(found: Schedule, expected: Schedule) -> None:
    for step in STEPS:
        assert float(found(step)) == pytest.approx(float(expected(step)), rel=1e-6, abs=1e-9)
        # Called as in the compiled step.
        assert float(found(jnp.int32(step))) == pytest.approx(float(expected(step)), rel=1e-5)


# Arguments in the config, some of them durations, and the equivalent arguments in steps.
OPTAX: dict[str, tuple[dict[str, Any], Schedule]] = {
    'constant_schedule': ({'value': 0.1}, optax.constant_schedule(0.1)),
    'cosine_decay_schedule': (
        {'init_value': 0.1, 'decay_steps': '100%', 'alpha': 0.1},
        optax.cosine_decay_schedule(0.1, 50, 0.1),
    ),
    'cosine_onecycle_schedule': (
        {'transition_steps': '10 epochs', 'peak_value': 0.1},
        optax.cosine_onecycle_schedule(50, 0.1),
    ),
    'exponential_decay': (
        {'init_value': 0.1, 'transition_steps': '1 epoch', 'decay_rate': 0.5, 'staircase': True},
        optax.exponential_decay(0.1, 5, 0.5, staircase=True),
    ),
    'linear_onecycle_schedule': (
        {'transition_steps': '100%', 'peak_value': 0.1},
        optax.linear_onecycle_schedule(50, 0.1),
    ),
    'linear_schedule': (
        {'init_value': 0.1, 'end_value': 0.0, 'transition_steps': '50%'},
        optax.linear_schedule(0.1, 0.0, 25),
    ),
    'piecewise_constant_schedule': (
        {'init_value': 0.1, 'boundaries_and_scales': {'2 epochs': 0.1, '5 epochs': 0.5}},
        optax.piecewise_constant_schedule(0.1, {10: 0.1, 25: 0.5}),
    ),
    'piecewise_interpolate_schedule': (
        {'interpolate_type': 'cosine', 'init_value': 0.1,
         'boundaries_and_scales': {'5 epochs': 0.1}},
        optax.piecewise_interpolate_schedule('cosine', 0.1, {25: 0.1}),
    ),
    'polynomial_schedule': (
        {'init_value': 0.1, 'end_value': 0.01, 'power': 2, 'transition_steps': '100%'},
        optax.polynomial_schedule(0.1, 0.01, 2, 50),
    ),
    'sgdr_schedule': (
        {'args': (({'init_value': 0.0, 'peak_value': 0.1, 'decay_steps': '2 epochs',
                    'warmup_steps': '1 epoch', 'end_value': 0.0},) * 5,)},
        optax.sgdr_schedule([dict(init_value=0.0, peak_value=0.1, decay_steps=10, warmup_steps=5,
                                  end_value=0.0)] * 5),
    ),
    'warmup_constant_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '10%'},
        optax.warmup_constant_schedule(0.0, 0.1, 5),
    ),
    'warmup_cosine_decay_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '2 epochs', 'decay_steps': '100%'},
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 50),
    ),
    'warmup_exponential_decay_schedule': (
        {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': '1 epoch', 'transition_steps': 10,
         'decay_rate': 0.5},
        optax.warmup_exponential_decay_schedule(0.0, 0.1, 5, 10, 0.5),
    ),
    'join_schedules': (
        {'schedules': ({'target': 'optax:linear_schedule', 'init_value': 0.0, 'end_value': 0.1,
                        'transition_steps': '1 epoch'},
                       {'target': 'optax:constant_schedule', 'value': 0.1}),
         'boundaries': ('1 epoch',)},
        optax.join_schedules(
            [optax.linear_schedule(0.0, 0.1, 5), optax.constant_schedule(0.1)], [5]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', OPTAX)
def test_schedules_of_optax(name: str) -> None:
    """Each by its name, with durations where it takes steps."""
    arguments, expected = OPTAX[name]
    assert_same(from_config({'target': f'optax:{name}', **arguments}), expected)


def test_every_schedule_of_optax_is_tested() -> None:
    names = {name for name in dir(optax.schedules) if name.endswith(('_schedule', '_schedules'))}
    public = {name for name in names if not name.startswith('_')}
    assert public | {'exponential_decay'} == set(OPTAX)


def test_warmup_and_cosine_decay_in_epochs() -> None:
    """As in the guide: ten steps per epoch, ten epochs with two of warmup, base rate 0.1."""
    node = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': '2 epochs', 'decay_steps': '10 epochs',
    }  # fmt: skip
    made = load_and_build(CONFIG, optimizer__learning_rate=node, data__batch_size=16, **SMALL)
    assert made.clock.steps_per_epoch == 10
    schedule = made.optimizer.learning_rate
    assert schedule is not None
    found = [float(schedule(step)) for step in (0, 10, 19, 20, 60, 100)]
    assert found == pytest.approx([0.0, 0.05, 0.095, 0.1, 0.05, 0.0], abs=1e-7)


@pytest.mark.parametrize('warmup', ['2 epochs', 100])
def test_warmup_longer_than_the_run_is_rejected(warmup: Any) -> None:
    node = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': warmup, 'decay_steps': '100%',
    }  # fmt: skip
    scaled = {'target': 'trainer.schedules:scale', 'schedule': node, 'factor': 0.5}
    options = {**SMALL, 'train_for': '5 steps'}
    for rate, path in ((node, 'learning_rate'), (scaled, 'learning_rate.schedule')):
        words = rf'config.optimizer.{path}.warmup_steps: .* the 5 steps of config.optimizer.{path}'
        with pytest.raises(UserError, match=words):
            load_and_build(CONFIG, optimizer__learning_rate=rate, **options)


def test_warmup_longer_than_a_cycle_is_rejected() -> None:
    """The message names the cycle; that of optax would not."""
    cycle = {'init_value': 0.0, 'peak_value': 0.1, 'warmup_steps': 2, 'decay_steps': 10}
    cycles = (cycle, {**cycle, 'warmup_steps': '2 epochs'})
    words = r'learning_rate\.{}\[1\]\.warmup_steps: a warmup of 10 steps does not fit into the 10'
    for place, where in (
        ({'args': (cycles,)}, r'args\[0\]'),
        ({'cosine_kwargs': cycles}, 'cosine'),
    ):
        with pytest.raises(UserError, match=words.format(where.replace('cosine', 'cosine_kwargs'))):
            from_config({'target': 'optax:sgdr_schedule', **place})


def test_boundaries_that_coincide_in_a_short_run_are_rejected() -> None:
    node = {
        'target': 'optax:piecewise_constant_schedule', 'init_value': 0.1,
        'boundaries_and_scales': {'60%': 0.1, '80%': 0.1},
    }  # fmt: skip
    options = {**SMALL, 'train_for': '2 steps'}
    with pytest.raises(UserError, match=r"'60%' and '80%' are both.*make the run longer"):
        load_and_build(CONFIG, optimizer__learning_rate=node, **options)


def test_warmup_of_zero_steps() -> None:
    """'0%' is 0 steps."""
    node = {'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1}
    expected = optax.warmup_cosine_decay_schedule(0.0, 0.1, 0, 50)
    for nothing in ('0%', '0 steps', '0 epochs', '0.0%'):
        assert_same(from_config({**node, 'warmup_steps': nothing, 'decay_steps': '100%'}), expected)
    rate = {**node, 'warmup_steps': '5%', 'decay_steps': '100%'}
    made = load_and_build(
        CONFIG,
        optimizer__learning_rate=rate, optimizer__learning_rate__warmup_steps='0%', **SMALL,
    )  # fmt: skip
    assert_same(made.optimizer.learning_rate, expected)
    joined = {
        'target': 'optax:join_schedules',
        'schedules': (
            {'target': 'optax:linear_schedule', 'init_value': 0.0, 'end_value': 0.1,
             'transition_steps': '0%'},
            {'target': 'optax:constant_schedule', 'value': 0.1},
        ),
        'boundaries': ('0%',),
    }  # fmt: skip
    assert_same(from_config(joined), optax.constant_schedule(0.1))


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        (
            {'target': 'optax:cosine_decay_schedule', 'init_value': 0.1, 'decay_steps': '0%'},
            'positive decay_steps, got decay_steps=0',
        ),
        (
            {'target': 'optax:warmup_constant_schedule', 'init_value': 0.0, 'peak_value': 0.1,
             'warmup_steps': '0%'},
            r'warmup_steps is 0 steps, but optax:warmup_constant_schedule needs at least 1',
        ),
        (
            {'target': 'optax:linear_schedule', 'args': (0.0, 0.1, '0%')},
            r'learning_rate\.args\[2\] is 0 steps, but optax:linear_schedule needs at least 1',
        ),
    ],
)  # fmt: skip
def test_length_of_zero_steps_is_rejected_where_optax_needs_one(
    node: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_config(node)


def test_other_durations_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"config\.log\.every: '0 steps' must be positive"):
        load_and_build(CONFIG, log__every='0 steps')


def test_integer_keys_from_json() -> None:
    """In JSON, all keys are strings."""
    expected = optax.piecewise_constant_schedule(0.1, {30: 0.1, 40: 0.5})
    text = (
        '{"target": "optax:piecewise_constant_schedule", "init_value": 0.1, '
        '"boundaries_and_scales": {"30": 0.1, "80%": 0.5}}'
    )
    made = load_and_build(CONFIG, optimizer__learning_rate=text, **SMALL)
    assert_same(made.optimizer.learning_rate, expected)
    by_position = {
        'target': 'optax:piecewise_constant_schedule',
        'args': (0.1, {'30': 0.1, '40': 0.5}),
    }
    assert_same(from_config(by_position), expected)
    twice = {**by_position, 'args': (0.1, {'30': 0.1, '030': 0.5})}
    with pytest.raises(UserError, match=r'learning_rate\.args\[1\]: step 30 is given twice'):
        from_config(twice)


def test_other_digit_keys_stay_strings() -> None:
    """Such as the labels of `optax:partition`."""
    sgd = {'target': 'optax:sgd', 'learning_rate': 0.1}
    node = {
        'target': 'optax:partition',
        'transforms': {'0': sgd, '1': {**sgd, 'learning_rate': 0.2}},
        'param_labels': {'ref': 'tests.step.perceptron:labels'},
    }  # fmt: skip
    logged = ('transforms.0.learning_rate', 'transforms.1.learning_rate')
    made = load_and_build(CONFIG, optimizer=repr(node), log__learning_rates=logged, **SMALL)
    assert set(made.optimizer.learning_rates or ()) == {'0', '1'}


def test_patience_counts_averages_with_accumulation_size() -> None:
    plateau = {
        'target': 'optax.contrib:reduce_on_plateau', 'accumulation_size': '1 epoch',
        'patience': '2 epochs',
    }  # fmt: skip
    sgd = {'target': 'optax:sgd', 'learning_rate': 0.1}
    chain = {'target': 'optax:chain', 'args': (sgd, plateau)}
    with pytest.raises(
        UserError, match=r'args\[1\]\.patience: .* counts averages over that many steps'
    ):
        load_and_build(CONFIG, optimizer=repr(chain), **SMALL)
    fine = {**chain, 'args': (sgd, {**plateau, 'patience': 2})}
    assert load_and_build(CONFIG, optimizer=repr(fine), **SMALL).origin.schedule_steps == {
        'config.optimizer.args[1].accumulation_size': 5
    }


LEGACY: dict[str, tuple[dict[str, Any], Schedule]] = {
    'constant': ({'warmup_length': 2}, optax.warmup_constant_schedule(0.0, 0.1, 10)),
    'stepped': (
        {'lr_sched_steps': ((3, 0.1), (6, 0.01), (8, 0.001))},
        optax.piecewise_constant_schedule(0.1, {15: 0.1, 30: 0.1, 40: 0.1}),
    ),
    'cosine': ({'halfcos_epochs': 10}, optax.cosine_decay_schedule(0.1, 50)),
}


@pytest.mark.parametrize('name', LEGACY)
def test_the_legacy_schedules_and_their_successors(name: str) -> None:
    """Those of `flax.training`, which a config can still name, equal those of optax."""
    arguments, successor = LEGACY[name]
    function = f'create_{name}_learning_rate_schedule'
    node = {
        'target': f'flax.training.lr_schedule:{function}',
        'base_learning_rate': 0.1, 'steps_per_epoch': '1 epoch', **arguments,
    }  # fmt: skip
    found = from_config(node)
    assert_same(found, getattr(lr_schedule, function)(0.1, 5, **arguments))
    # The legacy schedule changes one step later than that of optax.
    for step in set(STEPS) - {15, 30, 40}:
        assert float(found(step)) == pytest.approx(float(successor(step)), rel=1e-5, abs=1e-8)


def test_rsqrt_and_scaled() -> None:
    """Schedules that optax does not have."""
    node = {'target': 'trainer.schedules:rsqrt', 'peak_value': 0.1, 'warmup_steps': '1 epoch'}
    schedule = from_config(node)
    found = [float(schedule(step)) for step in (0, 1, 5, 20, 45)]
    assert found == pytest.approx([0.0, 0.02, 0.1, 0.05, 0.1 / 3])
    half = from_config({
        'target': 'trainer.schedules:scale', 'factor': 0.5, 'schedule': node,
    })  # fmt: skip
    assert_same(half, lambda step: 0.5 * schedule(step))
    with pytest.raises(ValueError, match='warmup_steps: expected at least 1'):
        schedules.rsqrt(0.1, 0)


WARMING = {'target': 'optax:linear_schedule', 'init_value': 0.1, 'end_value': 0.2,
           'transition_steps': 4}  # fmt: skip
SGD = {'target': 'optax:sgd', 'learning_rate': WARMING}

# Optimizers, and the key path of the learning rate inside; None for that of the target itself.
NESTED: dict[str, tuple[dict[str, Any], str | None]] = {
    'by position': ({'target': 'optax:sgd', 'args': (0.1,)}, None),
    'a schedule by position': ({'target': 'optax:sgd', 'args': (WARMING,)}, None),
    'by default': ({'target': f'{__name__}:with_a_default'}, None),
    'apply_if_finite': (
        {'target': 'optax:apply_if_finite', 'inner': SGD, 'max_consecutive_errors': 3},
        'inner.learning_rate',
    ),
    'masked': ({'target': 'optax:masked', 'args': (SGD, True)}, 'args[0].learning_rate'),
    'chain': (
        {'target': 'optax:chain', 'args': ({'target': 'optax:identity'}, SGD)},
        'args[1].learning_rate',
    ),
    'named_chain': (
        {'target': 'optax:named_chain', 'args': (('only', SGD),)}, 'args[0][1].learning_rate',
    ),
    'scale_by_schedule': (
        {'target': 'optax:chain', 'args': (
            {'target': 'optax:scale_by_schedule', 'step_size_fn': WARMING},
            {'target': 'optax:scale', 'args': (-1.0,)},
        )},
        'args[0].step_size_fn',
    ),
    'MultiSteps': (
        {'target': 'optax:MultiSteps', 'args': (SGD,), 'every_k_schedule': 2},
        'args[0].learning_rate',
    ),
    'MultiSteps of a chain': (
        {'target': 'optax:MultiSteps', 'every_k_schedule': 2, 'opt': {
            'target': 'optax:chain', 'args': (
                {'target': 'optax:scale', 'step_size': -1.0},
                {'target': 'optax:scale_by_schedule', 'args': (WARMING,)},
            ),
        }},
        'opt.args[1].args[0]',
    ),
}  # fmt: skip


def with_a_default(learning_rate: float = 0.3) -> optax.GradientTransformation:
    return optax.sgd(learning_rate)


def make_optimizer(optimizer: Mapping[str, Any], *logged: str, **groups: Any) -> Optimizer:
    sections = OptimizerSection(node=dict(optimizer), **groups)
    clock = Clock(batch_size=32, steps_per_epoch=Fraction(5), total_steps=10)
    return build_optimizer(sections, clock, logged=logged)[0]


@pytest.mark.parametrize('name', NESTED)
def test_learning_rate_of_a_nested_optimizer(name: str) -> None:
    """The logged rate is minus the update for a gradient of 1."""
    node, key = NESTED[name]
    assert key is None or make_optimizer(node).learning_rates is None
    optimizer = make_optimizer(node, *() if key is None else (key,))
    rate = optimizer.learning_rates
    assert callable(rate)
    params = {'x': jnp.ones(())}
    tx = optimizer.transformation(params)
    state, applied = tx.init(params), []
    for count in range(6):
        updates, state = tx.update(params, state, params)
        applied.append((float(rate(jnp.int32(count))), -float(updates['x'])))
    # Some accumulate gradients first.
    found = [(logged, moved) for logged, moved in applied if moved]
    assert len(found) == (3 if name.startswith('MultiSteps') else 6)
    assert [logged for logged, _ in found] == pytest.approx([moved for _, moved in found])
    assert len({logged for logged, _ in applied}) > 1 or name.startswith('by ')


PARTS = {
    'target': 'optax:multi_transform',
    'transforms': {'bias': {'target': 'optax:adam', 'args': (1e-3,)}, 'kernel': SGD},
    'param_labels': {'ref': f'{__name__}:bias_or_kernel'},
}


def bias_or_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)


@pytest.mark.slow
def test_several_rates_have_distinct_names(tmp_path: pathlib.Path) -> None:
    """The names are the differing parts of their key paths; within a group, too."""
    keys = ('transforms.bias.args[0]', 'transforms.kernel.learning_rate')
    options = {**SMALL, 'train_for': '3 steps', 'log__every': '1 steps'}
    options['log__learning_rates'] = keys
    Trainer(load_and_build(CONFIG, optimizer=PARTS, **options), str(tmp_path)).fit()
    rows = command.rows(tmp_path)
    assert [row['train/learning_rate/kernel'] for row in rows] == pytest.approx([0.1, 0.125, 0.15])
    assert [row['train/learning_rate/bias'] for row in rows] == pytest.approx([1e-3] * 3)
    groups = {'body': GroupSection(params='.*', node=PARTS)}
    rates = make_optimizer(
        {}, *(f'groups.body.{key}' for key in keys), groups=groups
    ).learning_rates
    assert isinstance(rates, Mapping) and set(rates) == {'body/bias', 'body/kernel'}
    pair = make_optimizer(
        {'target': 'optax:chain', 'args': (SGD, {'target': 'optax:sgd', 'args': (0.5,)})},
        'args[0].learning_rate', 'args[1].args[0]',
    )  # fmt: skip
    assert isinstance(pair.learning_rates, Mapping)
    assert {name: float(rate(4)) for name, rate in pair.learning_rates.items()} == pytest.approx(
        {'0': 0.2, '1': 0.5}
    )


@pytest.mark.parametrize(
    ('node', 'inside'),
    [
        ({'target': 'optax:adafactor'}, None),
        ({'target': 'optax:chain', 'args': ({'target': 'optax:scale', 'step_size': -0.1},)}, None),
        (
            {'target': 'optax:MultiSteps', 'opt': SGD, 'every_k_schedule': WARMING},
            'opt.learning_rate',
        ),
        ({'target': 'optax:chain', 'args': (SGD,)}, 'args[0].learning_rate'),
    ],
)
def test_unknown_rate_is_warned_about(
    node: dict[str, Any], inside: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_optimizer(node).learning_rates is None
    hint = f": name it in config.log.learning_rates=('{inside}',)" if inside else ''
    text = f'The learning rate of config.optimizer is unknown and will not be logged{hint}'
    assert caplog.messages == [text]
    caplog.clear()
    make_optimizer(SGD)
    make_optimizer({'target': 'optax:set_to_zero'})
    assert not caplog.messages


@pytest.mark.parametrize(
    ('node', 'key', 'groups', 'message'),
    [
        (SGD, 'args[1].learning_rate', {}, "config.optimizer has no 'args[1].learning_rate'"),
        (
            {'target': 'optax:MultiSteps', 'opt': SGD, 'every_k_schedule': WARMING},
            'opt.learning_rate', {}, 'the number of its updates is unknown',
        ),
        (
            {'target': 'optax:chain', 'args': (SGD,)}, 'args[0].target', {},
            r"config.optimizer.args[0].target: expected a number or a schedule",
        ),
        (
            {}, 'args[0].learning_rate', {'body': GroupSection(params='.*', node=SGD)},
            "'args[0].learning_rate' is in no group of config.optimizer.groups; expected a key "
            "such as 'groups.body.args[1].learning_rate'",
        ),
    ],
)  # fmt: skip
def test_unknown_keys_of_rates_are_rejected(
    node: dict[str, Any], key: str, groups: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_optimizer(node, key, groups=groups)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        (
            {'target': 'optax:cosine_decay_schedule', 'init_value': 0.1, 'decay_steps': 10},
            r'optimizer\.target: optax:cosine_decay_schedule does not return an optimizer.*'
            r'a schedule belongs in config\.optimizer\.learning_rate',
        ),
        (
            {'target': 'optax:inject_hyperparams', 'inner_factory': {'ref': 'optax:adam'}},
            r'optax:inject_hyperparams does not return an optimizer.* not needed .*'
            r'config\.ensemble\.vary',
        ),
        (
            {'target': 'optax:sgd', 'learning_rate': {'ref': 'optax:cosine_decay_schedule'}},
            r'learning_rate: .* is not a schedule.*decay_steps.*as target=',
        ),
        (
            {'target': 'optax:sgd', 'learning_rate': {'target': 'optax:adam', 'args': (0.1,)}},
            r'optimizer\.learning_rate: expected a number or a schedule.* got Gradient',
        ),
        ({'target': 'optax:sgd', 'args': ('0.1',)}, r'optimizer\.args\[0\]: .* got str'),
    ],
)  # fmt: skip
def test_invalid_optimizers_and_rates_are_rejected(node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(node)


def pair_of_counts(count: Any) -> Any:
    return jnp.stack([count, count])


@pytest.mark.parametrize('name', ['optax:constant_schedule', f'{__name__}:pair_of_counts'])
def test_rate_that_is_not_a_scalar_is_rejected(name: str) -> None:
    """Its signature is valid, so the error comes from tracing shapes, before training."""
    trainer = Trainer(load_and_build(CONFIG, optimizer__learning_rate={'ref': name}, **SMALL))
    with pytest.raises(UserError, match=r'config\.optimizer: the learning rate must be'):
        trainer.init_state()


def test_logged_rate_is_the_applied_rate(tmp_path: pathlib.Path) -> None:
    """Each row has the rate of the last update; here it grows exponentially."""
    node = {
        'target': 'optax:exponential_decay', 'init_value': 0.01, 'transition_steps': 1000,
        'decay_rate': float(np.e),
    }  # fmt: skip
    options = {**SMALL, 'train_for': '10 steps', 'log__every': '1 steps'}
    made = load_and_build(CONFIG, optimizer__learning_rate=node, **options)
    Trainer(made, str(tmp_path)).fit()
    rates = [row['train/learning_rate'] for row in command.rows(tmp_path)]
    assert rates == pytest.approx([0.01 * np.exp(step * 1e-3) for step in range(10)], rel=1e-6)


@pytest.mark.parametrize(
    ('named', 'message'),
    [
        (('learning_rate',), r'name one optimizer twice, or the optimizer itself'),
        (('args[',), r"config\.optimizer has no 'args\['"),
        (('',), r"config\.optimizer has no ''"),
        (('nothing',), r"config\.optimizer has no 'nothing'"),
    ],
)
def test_rates_that_cannot_be_logged_are_rejected(named: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=rf'^config\.log\.learning_rates: .*{message}'):
        load_and_build(CONFIG, log__learning_rates=named, **SMALL)
