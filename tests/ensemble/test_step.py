# SPDX-License-Identifier: Apache-2.0
"""Ensembles: several members in one program, each trained as in a run of its own."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import scipy.special

from tests import command
from trainer.config import loading, overrides
from trainer.config.errors import UserError
from trainer.ensemble import hyperparams
from trainer.ensemble.step import member_state
from trainer.experiment import Experiment, build, load_and_build
from trainer.modules.ensemble_outputs import mean, mean_sigmoid, mean_softmax
from trainer.step.state import TrainState
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'mnist_mlp.py')
SMALL: dict[str, Any] = {
    'train_for': '10 steps', 'log__every': '5 steps', 'checkpoint__every': 'never',
    'data__source__limit': 320, 'evals__test__data__source__limit': 100, 'data__seed': 0,
    'evals__test__every': 'never', 'evals__test__final': False,
}  # fmt: skip
RATES = (0.1, 0.01)


def experiment(**options: Any) -> Experiment:
    return load_and_build(CONFIG, **{**SMALL, **options})


def ensemble(**vary: Any) -> dict[str, Any]:
    return {'size': 2, 'vary': vary}


def train(**options: Any) -> tuple[TrainState, Trainer]:
    """Returns the state after eight updates, three of which are not logged yet."""
    trainer = Trainer(experiment(**options))
    return trainer.fit(max_steps=8).state, trainer


def assert_close(found: TrainState, expected: TrainState, **tolerance: float) -> None:
    """Compares variables, averages and metrics; only one state has varied hyperparameters."""
    # Accumulators that have seen nothing hold NaN.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected.metrics))
    for name in ('params', 'collections', 'ema', 'loss_scale', 'metrics'):
        a, b = getattr(found, name), getattr(expected, name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda x, y: assert_allclose(x, y, **tolerance), a, b)


def assert_allclose(x: Any, y: Any, **tolerance: float) -> None:
    assert x.dtype == y.dtype
    x, y = (np.asarray(a, None if a.dtype.itemsize > 2 else np.float32) for a in (x, y))
    np.testing.assert_allclose(x, y, **tolerance)


def relative_distance(found: TrainState, expected: TrainState, start: TrainState) -> float:
    """Returns the distance of a state's parameters, relative to their distance from the start."""

    def distance(one: TrainState, other: TrainState) -> float:
        pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
        return sum(float(((np.float64(a) - np.float64(b)) ** 2).sum()) for a, b in pairs) ** 0.5

    return distance(found, expected) / distance(start, expected)


COURSES: dict[str, dict[str, Any]] = {
    'dropout': {'model__dropout_rate': 0.5},
    'batch_stats': {'model__batch_norm': True, 'ema': {'decay': 0.9}},
    'micro-batches': {'accumulate': 2, 'optimizer__clip_norm': 0.5},
    'fused': {'steps_per_call': 5, 'model__dropout_rate': 0.5},
    'float16': {'precision': {'compute': 'float16'}},
    'bfloat16': {'precision': {'params': 'bfloat16'}},
    'adam': {'optimizer': {'target': 'optax:adam'}, 'optimizer__freeze': ('Dense_0/bias',)},
    'nnx': {'model__target': 'trainer.models.mlp_nnx:MLP', 'model__batch_norm': True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in ('dropout', 'batch_stats') else pytest.mark.slow)
        for name in COURSES
    ],
)
def test_a_member_trains_like_a_run_of_its_own(name: str) -> None:
    """Members differ pairwise, and each equals the run with its seed and hyperparameters."""
    options = COURSES[name]
    # Adam amplifies the last bit of a small gradient to a full step.
    rates = (1e-3, 1e-2) if name == 'adam' else RATES
    state, _ = train(**options, ensemble=ensemble(optimizer={'learning_rate': rates}))
    members = [member_state(state, index) for index in range(2)]
    for index, rate in enumerate(rates):
        alone, trainer = train(**options, seed=index, optimizer__learning_rate=rate)
        halves: dict[str, dict[str, float]] = {
            'float16': {'rtol': 1e-2, 'atol': 1e-3}, 'bfloat16': {'rtol': 0.1, 'atol': 0.02},
        }  # fmt: skip
        tolerance = halves.get(name, {})
        assert_close(members[index], alone, **{'rtol': 1e-4, 'atol': 1e-5, **tolerance})
        # A member that has learned nothing is off by 1, and may be within the tolerance.
        most = 0.1 if name == 'bfloat16' else 1e-4
        assert relative_distance(members[index], alone, trainer.init_state()) < most
    kernels = [jax.tree.leaves(member.params)[-1] for member in members]
    assert not np.allclose(kernels[0], kernels[1])


@pytest.mark.slow
def test_seeds_may_be_equal() -> None:
    """A sweep: the same initial state and dropout masks with another learning rate."""
    vary = {'seed': (7, 7), 'optimizer': {'learning_rate': RATES}}
    trainer = Trainer(experiment(ensemble=ensemble(**vary), model__dropout_rate=0.5))
    first, second = (member_state(trainer.init_state(), index) for index in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert trainer.experiment.ensemble is not None
    assert trainer.experiment.ensemble.describe(1) == 'seed 7, optimizer.learning_rate 0.01'


@pytest.mark.slow
def test_varied_hyperparameters_are_in_the_state(tmp_path: pathlib.Path) -> None:
    """They are in the checkpoint, and a resumed run is bitwise equal."""
    vary = {'optimizer': {'learning_rate': RATES, 'momentum': (0.5, 0.9)}}
    digests = []
    for name, pauses in (('whole', ()), ('parts', (3,))):
        made = experiment(ensemble=ensemble(**vary), model__dropout_rate=0.5)
        for steps in pauses:
            Trainer(made, str(tmp_path / name)).fit(max_steps=steps)
        Trainer(made, str(tmp_path / name)).fit()
        digests.append(command.result(tmp_path / name)['digest'])
    assert digests[0] == digests[1]
    restored = Trainer(made, str(tmp_path / 'parts')).restore()
    found = hyperparams.read(restored.opt_state, ('learning_rate', 'momentum'))
    assert found['learning_rate'].tolist() == pytest.approx(RATES)
    assert found['momentum'].tolist() == pytest.approx([0.5, 0.9])
    rows = command.rows(tmp_path / 'whole')
    assert rows[-1]['train/member_0/learning_rate'] == pytest.approx(0.1)
    assert rows[-1]['train/member_1/learning_rate'] == pytest.approx(RATES[1])
    # No member has their mean.
    assert 'train/learning_rate' not in rows[-1]
    members = [rows[-1][f'train/member_{index}/loss'] for index in range(2)]
    assert rows[-1]['train/loss'] == pytest.approx(np.mean(members))


def train_groups(head: float, body: float, **top: Any) -> TrainState:
    """Returns the state after a run with an optimizer for each of two groups."""
    loaded = loading.load(CONFIG)
    overrides.apply(loaded.config, [(k.replace('__', '.'), str(v)) for k, v in SMALL.items()])
    schedule = {'target': 'optax:cosine_decay_schedule', 'init_value': body, 'decay_steps': '100%'}
    sgd = {'target': 'optax:sgd'}
    loaded.config.optimizer = ml_collections.ConfigDict()
    loaded.config.optimizer.groups = {
        'head': {**sgd, 'params': 'Dense_1/.*', 'learning_rate': head},
        'body': {**sgd, 'params': 'Dense_0/.*', 'learning_rate': schedule},
    }
    loaded.config.update(top)
    return Trainer(build(loaded)).fit(max_steps=8).state


@pytest.mark.slow
def test_hyperparameters_within_schedules_and_groups() -> None:
    heads, bodies = (0.1, 0.01), (0.02, 0.2)
    inner = {'head': {'learning_rate': heads}, 'body': {'learning_rate': {'init_value': bodies}}}
    state = train_groups(0.1, 0.02, ensemble=ensemble(optimizer={'groups': inner}))
    for index, (head, body) in enumerate(zip(heads, bodies, strict=True)):
        alone = train_groups(head, body, seed=index)
        assert_close(member_state(state, index), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_factor_of_any_schedule() -> None:
    """A factor can vary around a schedule that branches in Python on its arguments."""
    inner = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': 2, 'decay_steps': 10,
    }  # fmt: skip
    scaled = {'target': 'trainer.schedules:scale', 'schedule': inner, 'factor': 1.0}
    vary = {'optimizer': {'learning_rate': {'factor': (1.0, 0.1)}}}
    options = {'optimizer__learning_rate': scaled, 'ensemble': ensemble(**vary)}
    trainer = Trainer(experiment(**options))
    with trainer.batches(0, [1] * 3) as batches:
        state = trainer.init_state()
        for batch in batches:
            state = trainer.set_up().programs.step(state, batch.arrays)
    rates = [float(member_state(state, i).metrics['learning_rate'].value) for i in range(2)]
    assert rates == pytest.approx([0.1, 0.01])


def test_members_share_the_batch() -> None:
    """It is read and sent once, not once for each member."""
    trainer = Trainer(experiment(ensemble=ensemble()))
    with trainer.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
    assert batch['image'].shape == (32, 28, 28, 1)
    assert trainer.set_up().programs.step(trainer.init_state(), batch).step == 1


def probabilities(trainer: Trainer, state: TrainState, batch: Any) -> np.ndarray:
    """Returns each member's probabilities (members, rows, classes), from bound models."""
    images = np.asarray(batch['image'], np.float32) / 255
    logits = [trainer.model(state, member=index)(images) for index in range(2)]
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


@pytest.mark.slow
def test_predictions_are_the_mean_of_probabilities() -> None:
    """In evaluations and predictions, over each example once."""
    state, trainer = train(ensemble=ensemble(optimizer={'learning_rate': RATES}))
    data = trainer.set_up().evaluators['test'].data.block(0, 1).arrays
    batch = {name: x[0][:100] for name, x in data.items()}
    each = probabilities(trainer, state, batch)
    together, labels = each.mean(0), batch['label']
    found = trainer.evaluate(state)['test']
    assert found['examples'] == 100
    assert found['accuracy'] == pytest.approx((together.argmax(-1) == labels).mean())
    rows = np.arange(100)
    assert found['loss'] == pytest.approx(-np.log(together[rows, labels]).mean(), rel=1e-4)
    for index, alone in enumerate(each):
        loss = -np.log(alone[rows, labels]).mean()
        assert found[f'member_{index}/loss'] == pytest.approx(loss, rel=1e-4)
        hits = (alone.argmax(-1) == labels).mean()
        assert found[f'member_{index}/accuracy'] == pytest.approx(hits)
    losses = [found[f'member_{index}/loss'] for index in range(2)]
    assert found['members/loss'] == pytest.approx(np.mean(losses))
    (predicted,) = trainer.predict('test', state)
    assert np.array_equal(predicted['class'], together.argmax(-1))
    np.testing.assert_allclose(predicted['probability'], together.max(-1), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'devices',
    [
        pytest.param({'ensemble': 2, 'data': 4}, marks=pytest.mark.slow),
        {'ensemble': 2, 'fsdp': 2, 'data': 2},
    ],
)
def test_members_are_sharded_over_devices(devices: dict[str, int]) -> None:
    """Members over the axis `ensemble`, examples over the others; the results are the same."""
    options = {'model__batch_norm': True, 'ensemble': ensemble(optimizer={'learning_rate': RATES})}
    rule = {'target': 'trainer.sharding:FSDP', 'min_bytes': 0}
    expected, whole = train(**options)
    sharding = (rule,) if 'fsdp' in devices else 'replicated'
    state, cut = train(**options, mesh=devices, sharding=sharding)
    kernel = state.params['Dense_0']['kernel']
    assert kernel.sharding.spec[0] == 'ensemble'
    columns = 784 // devices.get('fsdp', 1)
    assert {s.data.shape for s in kernel.addressable_shards} == {(1, columns, 64)}
    (slot,) = (x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape)
    assert slot.sharding == kernel.sharding
    assert_close(state, expected, rtol=1e-3, atol=1e-5)
    found, wanted = cut.evaluate(state)['test'], whole.evaluate(expected)['test']
    assert found == pytest.approx(wanted, rel=1e-3)


def test_combinations() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5, 4)) * 3
    softmax = scipy.special.softmax(logits, axis=-1).mean(0)
    np.testing.assert_allclose(np.exp(mean_softmax(logits)), softmax, rtol=1e-4)
    sigmoid = scipy.special.expit(logits).mean(0)
    np.testing.assert_allclose(jax.nn.sigmoid(mean_sigmoid(logits)), sigmoid, rtol=1e-4)
    np.testing.assert_allclose(
        mean({'y': logits.astype(np.float32)})['y'], logits.mean(0), atol=1e-5
    )
    with pytest.raises(UserError, match=r'the model returns arrays of int32.*combine\(outputs\)'):
        mean(np.zeros((2, 3), np.int32))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'size': 0}, r'size: expected at least 1, got 0'),
        ({'vary': {'model': {'features': (1, 2)}}}, r"'model.features' cannot vary"),
        ({'vary': {'optimizer': {'learning_rate': (0.1,)}}}, r'tuple of 2 numbers, one per member'),
        ({'vary': {'optimizer': {'rate': (1, 2)}}}, r"optax:sgd takes no argument 'rate'"),
        ({'vary': {'optimizer': {'clip_norm': (1, 2)}}}, r'clip_norm is not an argument of'),
        ({'vary': {'optimizer': {'learning_rate': {'x': (1, 2)}}}}, r"'learning_rate' is 0.01"),
        (
            {'vary': {'optimizer.learning_rate': RATES, 'optimizer': {'learning_rate': RATES}}},
            r"'optimizer.learning_rate' is given twice, \(0.1, 0.01\) and",
        ),
        ({'vary': {'seed': (0, 0.5)}}, r'a tuple of 2 integers'),
        ({'vary': {'seed': (0, 2**40)}}, r'has more than 32 bits'),
    ],
)  # fmt: skip
def test_mistakes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment(ensemble={'size': 2, **given})


CHAIN = {
    'target': 'optax:chain',
    'args': ({'target': 'optax:identity'}, {'target': 'optax:sgd', 'learning_rate': 0.5}),
}  # fmt: skip


def test_a_hyperparameter_in_a_tuple() -> None:
    """By its key path on the command line."""
    where = 'ensemble__vary__optimizer__args[1]__learning_rate'
    made = experiment(optimizer=CHAIN, ensemble__size=2, **{where: RATES}).ensemble
    assert made is not None and made.values == {'args[1].learning_rate': RATES}
    assert made.describe(1) == 'seed 1, optimizer.args[1].learning_rate 0.01'
    params = {'x': np.ones(3, np.float32)}
    for rate in RATES:
        optimizer = made.optimizer({'args[1].learning_rate': rate})
        tx = optimizer.transformation(params)
        state = tx.init(params)
        np.testing.assert_allclose(tx.update(params, state, params)[0]['x'], [-rate] * 3, rtol=1e-6)
        assert hyperparams.read(state, ['args[1].learning_rate']) == {'args[1].learning_rate': rate}
    with pytest.raises(
        UserError, match=r'Did you mean config\.optimizer\.args\[1\]\.learning_rate'
    ):
        experiment(optimizer=CHAIN, ensemble=ensemble(optimizer={'learning_rate': RATES}))
    both = {'args': {1: {'learning_rate': RATES}}, 'args[1]': {'learning_rate': RATES}}
    with pytest.raises(UserError, match=r'args\[1\]\.learning_rate is given twice'):
        experiment(optimizer=CHAIN, ensemble=ensemble(optimizer=both))


@pytest.mark.parametrize(
    ('vary', 'message'),
    [
        ({'learning_rate': RATES}, r'group has its own optimizer; vary optimizer\.groups\.body\.'),
        ({'clip_norm': RATES}, r'clip_norm is not an argument of an optimizer'),
        (
            {'groups': {'haed': {'learning_rate': RATES}}},
            r'Did you mean optimizer\.groups\.head\.learning_rate\?',
        ),
        ({'groups': {'x': {'learning_rate': RATES}}}, r'The groups are body, head'),
        ({'groups': {'head': RATES}}, r'head is not an argument.* The groups are body, head'),
        ({'groups': {'head': {'loss': RATES}}}, r'groups\.head\.loss is not an argument'),
    ],
)  # fmt: skip
def test_mistakes_with_groups(vary: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_groups(0.1, 0.02, ensemble=ensemble(optimizer=vary))


def test_mistakes_that_show_later() -> None:
    schedule = {
        'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
        'warmup_steps': 1, 'decay_steps': 9,
    }  # fmt: skip
    vary = {'optimizer': {'learning_rate': {'peak_value': (0.1, 0.2)}}}
    made = experiment(optimizer={'learning_rate': schedule}, ensemble=ensemble(**vary))
    with pytest.raises(UserError, match=r'branches in Python on learning_rate\.peak_value'):
        Trainer(made).init_state()
    with pytest.raises(UserError, match=r'3 members \(config.ensemble.size\) are not divisible'):
        Trainer(experiment(ensemble={'size': 3}, mesh={'ensemble': 2, 'data': -1})).init_state()
    with pytest.raises(
        UserError, match=r'give data or ensemble a size, such as --config.mesh.data=1'
    ):
        Trainer(experiment(ensemble={'size': 8}, mesh={'ensemble': -1})).init_state()
    trainer = Trainer(experiment(ensemble=ensemble()))
    with pytest.raises(UserError, match=r'choose a member, as in model\(member=0\)'):
        trainer.model(trainer.init_state())
    with pytest.raises(UserError, match='member 2: the ensemble has the members 0 to 1'):
        trainer.model(trainer.init_state(), member=2)


@pytest.mark.slow
def test_on_the_command_line(tmp_path: pathlib.Path) -> None:
    """`vary` accepts a key path as a string or as nested keys."""
    args = ('--config.ensemble.size=2', '--config.ensemble.vary.optimizer.learning_rate=(0.1,0.01)')
    finished = command.train(tmp_path / 'run', *args, '--config.train_for=1epochs')
    assert '  member 1  seed 1, optimizer.learning_rate 0.01\n' in finished.out
    assert 'eval/test member 1 (seed 1, optimizer.learning_rate 0.01)  accuracy ' in finished.out
    assert 'train/member_1' not in finished.out
    values = command.result(tmp_path / 'run')['metrics']
    assert values['eval/test/member_0/loss'] < values['eval/test/member_1/loss']
    for mode in ('eval', 'predict', 'summary', 'dry_run'):
        key = "--config.ensemble.vary={'optimizer.learning_rate': (0.1, 0.01)}"
        again = command.run(
            command.MLP, *command.SMALL, args[0], key, '--config.train_for=1epochs',
            f'--workdir={tmp_path / "run"}', f'--mode={mode}',
        )  # fmt: skip
        assert again.code == 0, again.err
