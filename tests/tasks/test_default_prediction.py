# SPDX-License-Identifier: Apache-2.0
"""A task without a method `predict` predicts the output of its model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from tests.in_memory import Net, make_config, points
from tests.marks import slow_after
from trainer import TaskOutput, Trainer, build
from trainer.config.errors import UserError

HERE = __name__


class Several(nn.Module):
    """Returns outputs of some structure."""

    structure: str
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        logits = nn.Dense(2, name='out')(x) * self.scale
        return {
            'dict': {'logits': logits, 'more': {'sum': logits.sum(-1)}},
            'tuple': (logits, logits.sum(-1)),
            'array': logits,
            'mean': (logits, logits.mean()),
            'tokens': logits.ravel(),
        }[self.structure]


class NNXNet(nnx.Module):
    """Two logits."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.out(x))


def cross_entropy(model: Any, batch: Any) -> jax.Array:
    loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
        model(batch['x']), batch['label']
    )
    return loss


def first_column(model: Any, batch: Any) -> jax.Array:
    size = len(batch['x'])
    return jax.tree.leaves(model(batch['x']))[0].reshape(size, -1)[:, 0]


def weighted_task(model: Any, batch: Any) -> Any:
    """Gives some examples no weight, which must have predictions all the same."""
    loss = cross_entropy(model, batch)
    return TaskOutput(loss=loss, weights=batch['label'].astype(jnp.float32))


def without_model(model: Any, batch: Any) -> jax.Array:
    return batch['x'][:, 0]


def two_calls(model: Any, batch: Any) -> jax.Array:
    return model(batch['x'])[:, 0] - model(2 * batch['x'])[:, 1]


def mapped_task(model: Any, batch: Any) -> jax.Array:
    return jax.vmap(lambda x: model(x[None])[0, 0])(batch['x'])


def trainer(task: str = 'cross_entropy', **changes: Any) -> Trainer:
    config = make_config(task=dict(ref=f'{HERE}:{task}'), **changes)
    return Trainer(build(config), verbose=False)


@pytest.mark.parametrize('task', ['cross_entropy', 'weighted_task'])
def test_a_plain_function_predicts_the_output_of_its_model(task: str) -> None:
    made, arrays = trainer(task), points(37)
    state = made.init_state()
    found = made.predict(arrays, state)
    assert found.keys() == {'output'}
    expected = Net().apply({'params': state.params}, arrays['x'])
    np.testing.assert_allclose(found['output'], np.asarray(expected), rtol=1e-5, atol=1e-6)
    (batch, *_) = made.predict('dev', state)
    assert batch['output'].shape == (16, 2)


def test_an_nnx_module_predicts_with_its_running_statistics() -> None:
    made, arrays = trainer(model=dict(target=f'{HERE}:NNXNet')), points(37)
    state = made.init_state()
    kernel = np.asarray(state.params['out']['kernel'])
    expected = arrays['x'] @ kernel / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(made.predict(arrays, state)['output'], expected, atol=1e-5)


@pytest.mark.parametrize(
    ('structure', 'names'),
    [('dict', ['logits', 'more/sum']), ('tuple', ['output/0', 'output/1'])],
)
def test_outputs_have_the_names_that_the_model_gives_them(structure: str, names: list[str]) -> None:
    made = trainer('first_column', model=dict(target=f'{HERE}:Several', structure=structure))
    found = made.predict(points(37), made.init_state())
    assert list(found) == names
    assert [x.shape for x in found.values()] == [(37, 2), (37,)]
    np.testing.assert_allclose(found[names[0]].sum(-1), found[names[1]], atol=1e-5)


class ArraysAlone:
    """A task whose predictions are no dict."""

    def __call__(self, model: Any, batch: Any) -> jax.Array:
        return first_column(model, batch)

    def predict(self, model: Any, batch: Any) -> Any:
        return model(batch['x'])


@pytest.mark.parametrize(
    ('structure', 'names'), [('array', ['output']), ('tuple', ['output/0', 'output/1'])]
)
def test_a_task_may_predict_without_names(structure: str, names: list[str]) -> None:
    model = dict(target=f'{HERE}:Several', structure=structure)
    config = make_config(task=dict(target=f'{HERE}:ArraysAlone'), model=model)
    made = Trainer(build(config), verbose=False)
    found = made.predict(points(37), made.init_state())
    assert list(found) == names and found[names[0]].shape == (37, 2)


def test_an_ensemble_predicts_the_combined_output() -> None:
    made, arrays = trainer(ensemble=dict(size=2)), points(37)
    state = made.init_state()
    members = jax.vmap(lambda params: Net().apply({'params': params}, arrays['x']))(state.params)
    found = made.predict(arrays, state)['output']
    np.testing.assert_allclose(found, np.asarray(members).mean(0), rtol=1e-4, atol=1e-5)


def score(examples: Any) -> dict[str, float]:
    assert examples.keys() == {'output', 'label'}
    return {'hits': (examples['output'].argmax(-1) == examples['label']).mean()}


def config_with_score(task: str = 'cross_entropy') -> ml_collections.ConfigDict:
    config = make_config(
        task=dict(ref=f'{HERE}:{task}'),
        model=dict(target=f'{HERE}:Several', structure='array'),
    )
    config.evals.dev.score = dict(ref=f'{HERE}:score', fields=('label',))
    config.evals.dev.model = dict(scale=3.0)
    return config


@pytest.mark.parametrize('task', slow_after(1, ['weighted_task', 'cross_entropy']))
def test_a_score_gets_the_output_of_the_evaluated_form_of_the_model(task: str) -> None:
    made = Trainer(build(config_with_score(task)), verbose=False)
    state, arrays = made.init_state(), points(21, seed=1)
    params = state.params['out']
    logits = 3 * (arrays['x'] @ params['kernel'] + params['bias'])
    np.testing.assert_allclose(made.predict(arrays, state)['output'], logits, atol=1e-5)
    hits = (np.asarray(logits).argmax(-1) == arrays['label']).mean()
    assert made.evaluate(state)['dev']['hits'] == hits


@pytest.mark.parametrize(
    ('task', 'structure', 'message'),
    [
        ('without_model', 'array', 'the task does not call the model'),
        ('two_calls', 'array', r'calls the model 2 times: model\(float32\[16, 4\]\) returned'),
        ('mapped_task', 'array', 'within a transformation of JAX'),
        (
            'first_column',
            'mean',
            r"'output/1' is float32\[\]; expected one entry for each of the 16",
        ),
        ('first_column', 'tokens', r"'output' is float32\[32\]; expected"),
    ],
)
def test_another_output_is_refused_with_advice(task: str, structure: str, message: str) -> None:
    config = make_config(
        task=dict(ref=f'{HERE}:first_column'),
        model=dict(target=f'{HERE}:Several', structure=structure),
    )
    config.evals.dev.task = dict(ref=f'{HERE}:{task}')
    made = Trainer(build(config), verbose=False)
    with pytest.raises(UserError, match=message) as caught:
        list(made.predict('dev', made.init_state()))
    text = str(caught.value)
    assert text.startswith(f'config.evals.dev: The task {HERE}:{task} has no method `predict`')
    assert 'Make the task a class with the methods' in text


def test_data_without_the_labels_is_refused_with_the_reason() -> None:
    made = trainer()
    with pytest.raises(UserError, match=r"batch\['label'\](?s:.*)the data needs every field"):
        made.predict({'x': points(3)['x']}, made.init_state())


def test_arguments_in_the_wrong_order_are_refused() -> None:
    made = trainer()
    state = made.init_state()
    with pytest.raises(UserError, match=r'got a dict\. The order is .*predict\(arrays, state\)'):
        made.predict(state, points(3))  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r'got a dict\. The order is evaluate\(state, data=arrays'):
        made.evaluate(points(3))  # type: ignore[call-overload]
