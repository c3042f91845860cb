# SPDX-License-Identifier: Apache-2.0
"""An evaluation may use another form of the model, with the trained variables."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tests.evaluate import scored
from tests.evaluate.test_host_scores import trainer
from tests.marks import slow_after
from trainer.config.errors import UserError

HERE = __name__


@flax.struct.dataclass
class Settings:
    """Settings as authors of models keep them."""

    scale: float = 1.0
    width: int = 2
    decode: bool = False


class Net(nn.Module):
    """Logits, scaled; in decoding, plus the number of calls so far."""

    settings: Settings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        logits = nn.Dense(self.settings.width)(x) * self.settings.scale
        if self.settings.decode:
            is_initialized = self.has_variable('cache', 'calls')
            calls = self.variable('cache', 'calls', jnp.zeros, ())
            if is_initialized:
                calls.value += 1
            logits = logits + calls.value
        return logits


class Named(nn.Module):
    """Logits, scaled, of a kernel with named dimensions."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ('inputs', 'outputs'))
        return nn.Dense(2, kernel_init=init)(x) * self.scale


class NNXNet(nnx.Module):
    """Logits, scaled."""

    def __init__(self, scale: float = 1.0, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x) * self.scale


class Largest:
    """Reports the logits of two calls, at zero inputs."""

    def __call__(self, model: Any, batch: Any) -> Any:
        first = model(batch['x'] * 0).sum(-1)
        return first, {'second': model(batch['x'] * 0).sum(-1), 'scaled': model(batch['x']).sum(-1)}


def config(target: str, **changes: Any) -> ml_collections.ConfigDict:
    made = scored.config()
    arguments = {'settings': {'target': f'{HERE}:Settings'}} if target == 'Net' else {}
    made.model = {'target': f'{HERE}:{target}', **arguments}
    made.task = dict(target=f'{HERE}:Largest')
    made.optimizer.learning_rate = 0.0
    data = made.evals.dev.data
    made.evals = {'plain': dict(data=data), 'other': dict(data=data, model=changes)}
    return made


@pytest.mark.parametrize(
    ('target', 'changes'),
    slow_after(
        2,
        [
            ('Net', {'settings': {'scale': 3.0}}),
            ('NNXNet', {'scale': 3.0}),
            ('Net', {'settings': Settings(scale=3.0)}),
            ('Named', {'scale': 3.0}),
        ],
    ),
)
def test_other_arguments_with_the_same_variables(target: str, changes: dict[str, Any]) -> None:
    made = config(target, **changes)
    rules = [('inputs', None), ('outputs', None)]
    made.sharding = (dict(target='trainer.sharding:ByName', rules=rules),)
    metrics = trainer(made).fit().metrics
    assert metrics['eval/plain/scaled'] != 0
    np.testing.assert_allclose(
        metrics['eval/other/scaled'], 3 * metrics['eval/plain/scaled'], rtol=1e-5
    )


def test_a_cache_is_new_in_each_batch_and_changes_with_each_call() -> None:
    metrics = trainer(config('Net', settings={'decode': True})).fit().metrics
    # Two logits each: the counts of the first call, and of the second.
    assert metrics['eval/other/loss'] - metrics['eval/plain/loss'] == 2 * 1
    assert metrics['eval/other/second'] - metrics['eval/plain/second'] == 2 * 2


def test_a_model_of_other_variables_is_refused() -> None:
    message = (
        r'config\.evals\.other: its `model` has other variables than config\.model, .*'
        r'params/Dense_0/bias: float32\[2\], here float32\[3\]; params/Dense_0/kernel: '
    )
    with pytest.raises(UserError, match=message):
        trainer(config('Net', settings={'width': 3})).compile()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'settings': {'scal': 3.0}}, r'config.evals.other.model.settings.scal'),
        ({'widht': 3}, r'config.evals.other.model.widht'),
    ],
)
def test_mistakes_name_their_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(config('Net', **changes))


@pytest.mark.slow
def test_an_ensemble_is_evaluated_in_another_form(tmp_path: pathlib.Path) -> None:
    made = config('Net', settings={'scale': 3.0})
    made.ensemble = dict(size=2)
    metrics = trainer(made).fit().metrics
    np.testing.assert_allclose(
        metrics['eval/other/scaled'], 3 * metrics['eval/plain/scaled'], rtol=1e-5
    )
    made.evals.other.model = {'settings': {'decode': True}}
    with pytest.raises(UserError, match='collections of its own'):
        trainer(made).compile()


def test_an_argument_of_the_model_may_be_a_bool() -> None:
    made = config('NNXNet', scale=True)
    metrics = trainer(made).fit().metrics
    assert metrics['eval/other/scaled'] == metrics['eval/plain/scaled']


class Decoded:
    """Predicts the sums of two calls, in a form with a cache, and returns a text of the host."""

    def predict(self, model: Any, batch: Any) -> Any:
        first, second = model(batch['x'] * 0), model(batch['x'] * 0)
        return {'difference': (second - first).sum(-1), 'name': batch['name']}


def difference(examples: Any) -> dict[str, float]:
    assert list(examples['name'][:2]) == ['point 0', 'point 1']
    return {'difference': float(examples['difference'].mean())}


def test_a_task_without_a_loss_predicts_with_a_cache() -> None:
    made = config('Net', settings={'decode': True})
    made.evals.other.task = dict(target=f'{HERE}:Decoded')
    made.evals.other.score = dict(ref=f'{HERE}:difference')
    assert trainer(made).fit().metrics['eval/other/difference'] == 2
