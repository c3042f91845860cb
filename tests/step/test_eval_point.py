# SPDX-License-Identifier: Apache-2.0
"""`optimizer.eval_params`: evaluation parameters that differ from the training parameters."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import serialization
from optax import contrib

from tests.step import tiny
from trainer.config import identity
from trainer.config.errors import UserError
from trainer.ensemble.step import member_state
from trainer.modes import export
from trainer.step.state import TrainState

NAMED = {'ref': 'optax.contrib:schedule_free_eval_params'}
FREE = {'target': 'optax.contrib:schedule_free_sgd', 'learning_rate': 3.0, 'eval_params': NAMED}
ADAM = {**FREE, 'target': 'optax.contrib:schedule_free_adamw', 'learning_rate': 0.1}
SGD = {'target': 'optax:sgd', 'learning_rate': 0.1}
POINTS = tiny.Points(77, 1).gather(np.arange(77))


def schedule_free_states(state: TrainState) -> list[contrib.ScheduleFreeState]:
    def is_free(x: Any) -> bool:
        return isinstance(x, contrib.ScheduleFreeState)

    return [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_free) if is_free(x)]


def eval_params_of_optax(state: TrainState) -> Any:
    """Returns the result of optax's own function for a single schedule-free optimizer."""
    (free,) = schedule_free_states(state)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
    return contrib.schedule_free_eval_params(free, params)


def logits(params: Any) -> jax.Array:
    return tiny.Net().apply({'params': params}, jnp.asarray(POINTS['x']))  # type: ignore[return-value]


def loss_at(params: Any) -> float:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params), POINTS['label'])
    return float(losses.mean())


COMBINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'alone': (FREE, {}),
    'clipped': ({**FREE, 'clip_norm': 0.1}, {}),
    'micro-batches': (FREE, {'accumulate': 2}),
    'fused': (FREE, {'steps_per_call': 5}),
    'average': (FREE, {'ema': {'decay': 0.9}}),
    'decay': ({**ADAM, 'weight_decay': 0.1}, {}),
    'devices': (
        {**FREE, 'clip_norm': 0.5},
        {
            'mesh': {'data': 2, 'fsdp': 4},
            'sharding': {'target': 'trainer.sharding:FSDP', 'min_bytes': 1},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', COMBINED)
def test_eval_params_are_evaluated(name: str) -> None:
    optimizer, options = COMBINED[name]
    trainer = tiny.trainer(optimizer=optimizer, **options)
    result = trainer.fit()
    state = jax.device_get(result.state)
    point = eval_params_of_optax(state)
    assert abs(loss_at(point) - loss_at(state.params)) > 1e-3
    assert result.metrics['eval/test/loss'] == pytest.approx(loss_at(point), rel=1e-4)
    np.testing.assert_allclose(trainer.model(result.state)(POINTS['x']), logits(point), atol=1e-4)
    assert (
        trainer.set_up().programs.step.compiles
        == trainer.set_up().programs.eval_params.compiles
        == 1
    )


@pytest.mark.slow
def test_predictions_and_exports_use_eval_params(tmp_path: pathlib.Path) -> None:
    trainer = tiny.trainer(tmp_path, optimizer=FREE)
    state = trainer.fit().state
    best = jax.nn.softmax(logits(eval_params_of_optax(state))).max(-1)
    assert float(jnp.abs(best - jax.nn.softmax(logits(state.params)).max(-1)).max()) > 1e-3
    predicted = np.concatenate([batch['probability'] for batch in trainer.predict('test')])
    np.testing.assert_allclose(predicted, best, atol=1e-5)
    export.write(trainer.set_up().evaluators['test'], state, epath.Path(tmp_path / 'out'))
    kept = serialization.msgpack_restore((tmp_path / 'out' / export.MSGPACK).read_bytes())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        kept['params'],
        eval_params_of_optax(state),
    )


@pytest.mark.slow
def test_best_checkpoint_is_selected_by_eval_params(tmp_path: pathlib.Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        optimizer=FREE,
        evals={'test': {**tiny.EVAL, 'every': '5 steps'}},
        checkpoint={'every': '5 steps', 'keep_last': 9, 'best': {'metric': 'eval/test/loss'}},
    )
    trainer.fit()
    losses = {}
    for step in (5, 10, 15, 20):
        losses[step] = loss_at(eval_params_of_optax(trainer.restore(step)))
        meta = json.loads((tmp_path / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())
        assert meta['metrics']['eval/test/loss'] == pytest.approx(losses[step], rel=1e-4)
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.best() == min(losses, key=lambda step: losses[step])


@pytest.mark.slow
def test_groups_with_eval_params_and_frozen_parameters() -> None:
    """Each group has its own optimizer and evaluation parameters; frozen ones do not change."""
    groups = {
        'kernels': {**FREE, 'params': '.*/kernel', 'clip_norm': 1.0},
        'biases': {**SGD, 'params': '.*/bias'},
    }
    trainer = tiny.trainer(
        optimizer={'groups': groups, 'freeze': 'Dense_0/kernel', 'clip_norm': 1.0}
    )
    result = trainer.fit()
    state = result.state
    (free,) = schedule_free_states(state)
    kernel = state.params['Dense_1']['kernel']
    x = (kernel - 0.1 * free.z['Dense_1']['kernel']) / 0.9
    assert float(jnp.abs(x - kernel).max()) > 1e-3
    expected = {
        'Dense_0': state.params['Dense_0'],
        'Dense_1': {'kernel': x, 'bias': state.params['Dense_1']['bias']},
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        trainer.eval_params(state),
        expected,
    )
    assert result.metrics['eval/test/loss'] == pytest.approx(loss_at(expected), rel=1e-4)


@pytest.mark.slow
def test_ema_evaluation_ignores_eval_params() -> None:
    """`evals.<name>.ema` evaluates the moving average, whatever `eval_params` is."""
    evals = {'test': tiny.EVAL, 'mean': {**tiny.EVAL, 'ema': True}}
    result = tiny.trainer(optimizer=FREE, ema={'decay': 0.5}, evals=evals).fit()
    assert result.metrics['eval/mean/loss'] == pytest.approx(loss_at(result.state.ema), rel=1e-4)
    assert result.metrics['eval/test/loss'] == pytest.approx(
        loss_at(eval_params_of_optax(result.state)), rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize('vary', [{}, {'optimizer': {'learning_rate': (1.0, 0.3)}}])
def test_eval_params_of_ensemble_members(vary: dict[str, Any]) -> None:
    """Also if hyperparameters are in the state, which wraps the optimizer's state."""
    trainer = tiny.trainer(optimizer=FREE, ensemble={'size': 2, 'vary': vary})
    result = trainer.fit()
    points = [eval_params_of_optax(member_state(result.state, index)) for index in range(2)]
    for index, point in enumerate(points):
        loss = result.metrics[f'eval/test/member_{index}/loss']
        assert loss == pytest.approx(loss_at(point), rel=1e-4)
        np.testing.assert_allclose(
            # Logits are about a thousand, and float32 has seven digits.
            trainer.model(result.state, member=index)(POINTS['x']),
            logits(point),
            rtol=1e-5,
            atol=1e-4,
        )
    mean = jnp.log(jnp.mean(jnp.stack([jax.nn.softmax(logits(p)) for p in points]), 0))
    losses = optax.softmax_cross_entropy_with_integer_labels(mean, POINTS['label'])
    assert result.metrics['eval/test/loss'] == pytest.approx(float(losses.mean()), rel=1e-4)


@pytest.mark.slow
def test_eval_params_of_an_nnx_model() -> None:
    trainer = tiny.trainer(optimizer=FREE, model={'target': f'{tiny.__name__}:NNXNet'})
    state = trainer.fit().state
    model = trainer.model(state)
    np.testing.assert_allclose(
        model.body.kernel[...], eval_params_of_optax(state)['body']['kernel'], atol=1e-6
    )
    assert float(jnp.abs(model.body.kernel[...] - state.params['body']['kernel']).max()) > 1e-3


@pytest.mark.slow
def test_eval_params_of_half_precision_are_computed_in_float32() -> None:
    trainer = tiny.trainer(optimizer=FREE, precision={'params': 'bfloat16'})
    state = trainer.fit().state
    (free,) = schedule_free_states(state)
    assert {x.dtype for x in jax.tree.leaves(free.z)} == {jnp.dtype('float32')}
    point = jax.tree.map(lambda x: x.astype(jnp.bfloat16), eval_params_of_optax(state))
    evaluated = trainer.eval_params(state)
    jax.tree.map(np.testing.assert_array_equal, evaluated, point)


def test_missing_eval_params_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    unnamed = {name: value for name, value in FREE.items() if name != 'eval_params'}
    groups = {'all': {**unnamed, 'params': '.*'}}
    for optimizer, place in ((unnamed, ''), ({'groups': groups}, '.groups.all')):
        caplog.clear()
        _ = tiny.trainer(optimizer=optimizer).set_up().programs
        (text,) = [m for m in caplog.messages if 'evaluated' in m]
        assert f'set config.optimizer{place}.eval_params=dict(ref=' in text
        assert '\n' not in text and NAMED['ref'] in text
    caplog.clear()
    _ = tiny.trainer(optimizer=FREE).set_up().programs
    _ = tiny.trainer(optimizer=SGD).set_up().programs
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


SAM = {
    'target': 'optax.contrib:sam', 'sync_period': 2, 'optimizer': SGD,
    'adv_optimizer': {'target': 'optax:sgd', 'learning_rate': 0.5},
}  # fmt: skip


@pytest.mark.slow
def test_sam_is_evaluated_without_its_adversarial_step(caplog: pytest.LogCaptureFixture) -> None:
    named = {**SAM, 'eval_params': {'ref': 'trainer.step.eval_point:adversarial'}}
    trainer = tiny.trainer(optimizer=named)
    after_4 = trainer.fit(max_steps=4).state
    here = jax.device_get(trainer.eval_params(after_4))
    jax.tree.map(np.testing.assert_array_equal, here, jax.device_get(after_4.params))
    after_5 = trainer.fit(max_steps=1).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.eval_params(after_5)), here)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after_5.params, here)
    assert max(jax.tree.leaves(moved)) > 1e-3
    _ = tiny.trainer(optimizer=SAM).set_up().programs
    assert any("dict(ref='trainer.step.eval_point:adversarial')" in m for m in caplog.messages)


def other_shapes(state: Any, params: Any) -> Any:
    return {**params, 'Dense_0': params['Dense_1']}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    'another optimizer': (
        {**SGD, 'eval_params': NAMED},
        r"config\.optimizer\.eval_params: \S+:schedule_free_eval_params was called with the state "
        r"of the optimizer \(tuple\).* failed: AttributeError",
    ),
    'within MultiSteps': (
        {'target': 'optax:MultiSteps', 'every_k_schedule': 2, 'eval_params': NAMED,
         'opt': {'target': 'optax.contrib:schedule_free_sgd', 'learning_rate': 1.0}},
        r'MultiStepsState.*config\.accumulate',
    ),
    'other shapes': (
        {**SGD, 'eval_params': {'ref': f'{__name__}:other_shapes'}},
        r'eval_point:other_shapes must return parameters with the same paths.*Dense_0/bias',
    ),
    'no function of two': (
        {**SGD, 'eval_params': {'ref': 'optax:global_norm'}},
        r'config\.optimizer\.eval_params: expected a function \(state, parameters\)',
    ),
    'no such name': (
        {**SGD, 'eval_params': {'ref': 'optax.contrib:schedule_free_params'}},
        r'config\.optimizer\.eval_params\.ref',
    ),
    'beside groups': (
        {'groups': {'all': {**FREE, 'params': '.*'}}, 'eval_params': NAMED},
        r'config\.optimizer\.eval_params: with config\.optimizer\.groups',
    ),
    'multipliers': (
        {**FREE, 'lr_multipliers': (('.*', 0.5),)},
        r'config\.optimizer\.lr_multipliers: they scale the update.*config\.optimizer\.groups',
    ),
    'multipliers of groups': (
        {'groups': {'all': {**FREE, 'params': '.*'}}, 'lr_multipliers': (('.*', 0.5),)},
        r'config\.optimizer\.lr_multipliers: they scale the update',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG)
def test_invalid_eval_params_are_rejected_before_compilation(name: str) -> None:
    optimizer, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        tiny.trainer(optimizer=optimizer).compile()


@pytest.mark.slow
def test_eval_params_are_not_part_of_the_identity_of_a_run(tmp_path: pathlib.Path) -> None:
    unnamed = {name: value for name, value in FREE.items() if name != 'eval_params'}
    tiny.trainer(tmp_path, optimizer=unnamed).fit(max_steps=10)
    trainer = tiny.trainer(tmp_path, optimizer=FREE)
    result = trainer.fit()
    assert result.metrics['eval/test/loss'] == pytest.approx(
        loss_at(eval_params_of_optax(result.state)), rel=1e-4
    )
    assert not identity.is_identity('optimizer.groups.body.eval_params.ref')
    assert identity.is_identity('optimizer.eval_parameters')
