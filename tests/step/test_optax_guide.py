# SPDX-License-Identifier: Apache-2.0
"""Flax's guide "Upgrading my codebase to Optax": its optimizers and accuracies."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import command
from tests.marks import slow_except
from tests.step import perceptron
from trainer.experiment import load_and_build
from trainer.hooks import Event
from trainer.step.state import TrainState
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer

AT = perceptron.__name__
SGD = {'target': 'optax:sgd', 'learning_rate': 0.01, 'momentum': 0.9}
TRACE = {'target': 'optax:trace', 'decay': 0.9}
SCALE = {'target': 'optax:scale', 'step_size': -0.01}
SLOW = {**SGD, 'learning_rate': 0.001}
GROWTH = {
    'target': 'optax:exponential_decay', 'init_value': 0.01, 'transition_steps': 1000,
    'decay_rate': float(np.e),
}  # fmt: skip


def chain(*parts: Any) -> dict[str, Any]:
    return {'target': 'optax:chain', 'args': parts}


def mask_config(inner: dict[str, Any], mask: str) -> dict[str, Any]:
    return {'target': 'optax:masked', 'inner': inner, 'mask': {'ref': f'{AT}:{mask}'}}


# Each with the accuracy that the guide prints; entries of one name are the same optimizer.
OPTIMIZERS: dict[str, tuple[float, tuple[dict[str, Any], ...]]] = {
    'F1': (0.9165, (SGD, chain(TRACE, SCALE))),
    'F2': (0.9517, (
        {'target': 'optax:adamw', 'learning_rate': 0.01, 'weight_decay': 1e-5},
        chain(
            {'target': 'optax:scale_by_adam'},
            {'target': 'optax:add_decayed_weights', 'weight_decay': 1e-5},
            SCALE,
        ),
    )),
    'F3': (0.9168, (
        {**SGD, 'clip_norm': 1.0},
        chain({'target': 'optax:clip_by_global_norm', 'max_norm': 1.0}, TRACE, SCALE),
    )),
    'E5': (0.9201, (
        {**SGD, 'learning_rate': GROWTH},
        chain(TRACE, {'target': 'optax:scale_by_schedule', 'step_size_fn': GROWTH},
              {'target': 'optax:scale', 'step_size': -1.0}),
    )),
    'F4, F5': (0.9168, (
        {'groups': {'kernels': {**SGD, 'params': '.*/kernel'},
                    'biases': {**SLOW, 'params': '.*/bias'}}},
        chain(mask_config(SGD, 'kernels'), mask_config(SLOW, 'biases')),
        {'target': 'optax:multi_transform', 'transforms': {'kernel': SGD, 'bias': SLOW},
         'param_labels': {'ref': f'{AT}:labels'}},
    )),
    'F4': (0.9168, ({**SGD, 'lr_multipliers': (('.*/kernel', 1.0), ('.*/bias', 0.1))},)),
}  # fmt: skip


@functools.cache
def fit(name: str, index: int) -> tuple[float, Any]:
    """Returns the accuracy on the test split and the parameters after the epoch."""
    trainer = perceptron.trainer(OPTIMIZERS[name][1][index])
    assert trainer.experiment.training.total_steps == 469
    state = trainer.fit().state
    return trainer.evaluate(state)['test']['accuracy'], jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_accuracies_of_the_guide(name: str) -> None:
    """Within .012 of the guide; all forms of an optimizer are bit-equal."""
    printed, forms = OPTIMIZERS[name]
    accuracy, params = fit(name, 0)
    assert accuracy == pytest.approx(printed, abs=0.012)
    for index in range(1, len(forms)):
        other, same = fit(name, index)
        assert other == accuracy
        jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.slow
def test_multiplier_equals_a_smaller_rate() -> None:
    """Up to rounding, because the product is computed in two operations."""
    accuracy, params = fit('F4', 0)
    other, same = fit('F4, F5', 0)
    assert accuracy == pytest.approx(other, abs=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, same)


def test_initial_parameters_have_chance_accuracy() -> None:
    trainer = perceptron.trainer(SGD)
    assert trainer.evaluate(trainer.init_state())['test']['accuracy'] == pytest.approx(
        0.1, abs=0.07
    )


def test_unmasked_updates_pass_through() -> None:
    """Updates that no mask covers are not zeroed; the masks of the chain above cover all."""
    made = perceptron.trainer(chain(mask_config(SGD, 'kernels'))).experiment.optimizer
    params = {'Dense_0': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
    tx = made.transformation(params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates['Dense_0']['bias'].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(updates['Dense_0']['kernel'], np.full((2, 2), -0.01))


def steps(trainer: Trainer, count: int) -> TrainState:
    state = trainer.init_state()
    with trainer.batches(0, [1] * count) as batches:
        for batch in batches:
            state = trainer.set_up().programs.step(state, batch.arrays)
    return state


# The optimizers of Flax's examples, and Adafactor, which was ported later.
DROP_IN = {
    'imagenet, mnist': {**SGD, 'nesterov': True},
    'nlp_seq, wmt': {
        'target': 'optax:adamw', 'learning_rate': 0.01, 'b2': 0.98, 'eps': 1e-9,
        'weight_decay': 0.1, 'decay_mask': '.*/kernel',
    },
    'pixelcnn, ppo, seq2seq, vae': {'target': 'optax:adam', 'learning_rate': 0.001},
    'adafactor': {'target': 'optax:adafactor', 'learning_rate': 0.01},
    'lamb': {'target': 'optax:lamb', 'learning_rate': 0.001},
    'adagrad': {'target': 'optax:adagrad', 'learning_rate': 0.01},
    'rmsprop': {'target': 'optax:rmsprop', 'learning_rate': 0.001},
}  # fmt: skip


@pytest.mark.parametrize('name', slow_except(['nlp_seq, wmt'], DROP_IN))
def test_drop_in_replacements(name: str) -> None:
    """They train from a config, and their rate is logged."""
    trainer = perceptron.trainer(DROP_IN[name])
    before = float(trainer.evaluate(trainer.init_state())['test']['loss'])
    state = steps(trainer, 20)
    assert trainer.evaluate(state)['test']['loss'] < before
    assert trainer.experiment.optimizer.learning_rate is not None
    assert float(state.metrics['learning_rate'].value) == pytest.approx(
        DROP_IN[name]['learning_rate']  # type: ignore[arg-type]
    )


def inject(**numbers: float) -> optax.GradientTransformation:
    """An optimizer of a user, with hyperparameters in its state."""
    return optax.inject_hyperparams(optax.adamw)(**numbers)


SEEN: list[tuple[int, int, float]] = []


def look(event: Event) -> None:
    """A hook that reads counts and hyperparameters of the optimizer."""
    if event.kind == 'log':
        state = event.state.opt_state
        decay = state.hyperparams['weight_decay']
        SEEN.append((event.step, int(state.count), float(decay)))


@pytest.mark.slow
def test_hyperparameters_and_counts_are_in_the_state(tmp_path: pathlib.Path) -> None:
    """Numeric arguments of an optimizer are in its state, next to its count."""
    SEEN.clear()
    trainer = perceptron.trainer(
        {'target': f'{__name__}:inject', 'accepts_any': True,
         'learning_rate': 0.01, 'weight_decay': 0.1},
        train_for='30 steps', log={'every': '10 steps'}, evals={},
        hooks={'look': {'ref': f'{__name__}:look'}},
    )  # fmt: skip
    state = trainer.fit().state
    assert [seen[:2] for seen in SEEN] == [(10, 10), (20, 20), (30, 30)]
    assert SEEN[0][2] == pytest.approx(0.1)
    assert float(state.opt_state.hyperparams['learning_rate']) == pytest.approx(0.01)
    # A hyperparameter that is changed in the state is used from then on.
    numbers = {**state.opt_state.hyperparams, 'learning_rate': jnp.float32(0)}
    still = dataclasses.replace(state, opt_state=state.opt_state._replace(hyperparams=numbers))
    still = jax.device_put(
        still, jax.tree.map(lambda x: x.sharding, trainer.set_up().programs.abstract)
    )
    before = jax.device_get(still.params)
    with trainer.batches(30, [1]) as batches:
        batch = next(iter(batches)).arrays
        after = trainer.set_up().programs.step(still, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before)


def test_scale_by_schedule_needs_a_negative_schedule() -> None:
    """`scale_by_schedule` only scales; `scale_by_learning_rate` also negates."""
    up = chain({'target': 'optax:scale_by_schedule', 'step_size_fn': GROWTH})
    down = chain({'target': 'optax:scale_by_learning_rate', 'learning_rate': GROWTH})
    params = {'w': jnp.zeros(3)}
    found = []
    for node in (up, down):
        tx = perceptron.trainer(node).experiment.optimizer.transformation(params)
        updates, _ = tx.update({'w': jnp.ones(3)}, tx.init(params), params)
        found.append(float(updates['w'][0]))
    assert found == pytest.approx([0.01, -0.01])


def norms_of_each(model: Any, batch: Mapping[str, jax.Array]) -> TaskOutput:
    """Per-example losses by `vmap` of code for one example."""

    def loss(logits: jax.Array, label: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def one(image: jax.Array, label: jax.Array) -> jax.Array:
        return jax.grad(lambda x: loss(model(x[None])[0], label))(image)

    each = jax.vmap(one)(batch['image'], batch['label'])
    size = jnp.sqrt((each.reshape(len(each), -1) ** 2).sum(-1))
    return TaskOutput(
        loss=loss(model(batch['image']), batch['label']), metrics={'input_grad': size}
    )


@pytest.mark.slow
def test_per_example_code_with_vmap() -> None:
    """Code for one example is mapped over the batch inside the task."""
    task = {'ref': f'{__name__}:norms_of_each'}
    trainer = perceptron.trainer(SGD, task=task, evals={})
    with trainer.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
        state = trainer.init_state()
        params = jax.device_get(state.params)
        found = float(
            trainer.set_up().programs.step(state, batch).metrics['task'].input_grad.compute()
        )
    images, labels = np.asarray(batch['image'], 'f4') / 255, np.asarray(batch['label'])
    expected = []
    for image, label in zip(images, labels, strict=True):

        def loss(x: Any, label: Any = label) -> Any:
            logits = perceptron.Perceptron().apply({'params': params}, x[None])
            return optax.softmax_cross_entropy_with_integer_labels(logits[0], label)

        expected.append(np.sqrt((np.asarray(jax.grad(loss)(jnp.asarray(image))) ** 2).sum()))
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.slow
def test_gradient_norms_are_logged_before_clipping(tmp_path: pathlib.Path) -> None:
    """The row has the norm of the original gradient; the update uses the clipped one."""
    options = {
        'data__source__limit': 320,
        'evals': {},
        'train_for': '1 steps',
        'log__every': '1 steps',
    }
    path = str(command.ROOT / 'configs' / 'mnist_mlp.py')
    for name, clip in (('free', None), ('cut', 0.01)):
        extra = {} if clip is None else {'optimizer__clip_norm': clip}
        Trainer(load_and_build(path, **options, **extra), str(tmp_path / name)).fit()
    (free,), (cut,) = (command.rows(tmp_path / name) for name in ('free', 'cut'))
    assert cut['train/grad_norm'] == pytest.approx(free['train/grad_norm'], rel=1e-5)
    assert free['train/grad_norm'] > 0.1
    assert cut['train/update_norm'] == pytest.approx(0.01 * 0.01, rel=1e-4)
