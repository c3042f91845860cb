# SPDX-License-Identifier: Apache-2.0
"""Klinen models in the Trainer, and the example in the package's docstring."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.command import ROOT
from tests.inspect.program import computation
from tests.modules.examples import X, bind, same
from trainer import klinen as knn
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer


class Features(knn.Module):
    """Statistics and dropout that follow `self.training`, and a Linen layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(32)(x.reshape((x.shape[0], -1)))
        x = nn.BatchNorm(use_running_average=not self.training, momentum=0.9)(x)
        return knn.Dropout(0.5)(nn.relu(x))


class Classifier(knn.Module):
    features: knn.Module
    head: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


class LinenFeatures(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(32)(x.reshape((x.shape[0], -1)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class LinenClassifier(nn.Module):
    features: nn.Module
    head: nn.Module

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.head(self.features(x, train))


class Plain(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(784, 10, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.dense(x.reshape((x.shape[0], -1))))


def model(name: str, features: str) -> dict[str, Any]:
    return {
        'target': f'{__name__}:{name}',
        'features': {'target': f'{__name__}:{features}'},
        'head': {'target': 'trainer.klinen:Dense', 'features': 10},
    }


def trainer_of(
    config: dict[str, Any], workdir: pathlib.Path | None = None, **options: Any
) -> Trainer:
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'),
        model=config,
        train_for='30 steps',
        data__source__limit=640,
        evals__test__data__source__limit=100,
        evals__test__data__batch_size=64,
        log__every='1 steps',
        **options,
    )
    return Trainer(experiment, None if workdir is None else str(workdir))


def images(trainer: Trainer) -> tuple[jax.Array, np.ndarray]:
    """Returns the test split after the config's transform."""
    block = trainer.set_up().evaluators['test'].data.block(0, 2).arrays
    real = block['_mask']
    return jnp.asarray(block['image'][real], jnp.float32) / 255, block['label'][real]


@pytest.mark.slow
def test_a_klinen_model_trains_like_its_linen_twin(tmp_path: pathlib.Path) -> None:
    """Bitwise; the model for a notebook is bound and in evaluation mode."""
    klinen = trainer_of(model('Classifier', 'Features'), tmp_path / 'klinen')
    linen = trainer_of(model('LinenClassifier', 'LinenFeatures'), tmp_path / 'linen')
    result, expected = klinen.fit(), linen.fit()
    rows = [(tmp_path / name / 'metrics.jsonl').read_text() for name in ('klinen', 'linen')]
    losses = [re.findall(r'"(?:train|eval/test)/loss": ([\d.e-]+)', text) for text in rows]
    assert len(losses[0]) == 32
    assert losses[0] == losses[1]
    assert jax.tree.all(jax.tree.map(same, result.state.variables, expected.state.variables))

    trained = klinen.model(result.state)
    assert isinstance(trained, Classifier)
    assert not trained.training
    x, labels = images(klinen)
    accuracy = (trained(x).argmax(-1) == labels).mean()
    assert accuracy == pytest.approx(klinen.evaluate(result.state)['test']['accuracy'])
    assert same(trained.head(trained.features(x)), trained(x))
    assert same(klinen.model()(x), trained(x))
    y, updated = trained.train().with_rng(0).call_with_updates(x)
    assert not same(y, trained(x))
    assert not same(updated.eval()(x), trained(x))

    bound = linen.model(expected.state)
    assert isinstance(bound, LinenClassifier)
    assert same(bound(x), trained(x))
    assert same(bound.head(bound.features(x)), trained(x))
    module, variables = bound.features.unbind()
    assert same(module.apply(variables, x, train=False), bound.features(x))


class Stored(Features):
    """Stores its output and a count of its calls, which restarts in each call."""

    outputs: knn.Intermediate[list[jax.Array]] = dataclasses.field(init=False, default_factory=list)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = super().__call__(x)
        self.outputs.append(x)
        return x


def quiet(model: Any, batch: Any) -> TaskOutput:
    """A classifier with a penalty on its features."""
    logits = model(batch['image'])
    (features,) = model.intermediates['features']['outputs']
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return TaskOutput(loss=loss, penalties={'features': jnp.square(features).mean()})


@pytest.mark.slow
def test_a_task_reads_intermediate_fields(tmp_path: pathlib.Path) -> None:
    """In training, evaluation and captures; a task that does not read them pays nothing."""
    trainer = trainer_of(
        model('Classifier', 'Stored'), tmp_path, task={'ref': f'{__name__}:quiet'},
        capture={'outputs': {'match': 'features/outputs'}},
    )  # fmt: skip
    metrics = trainer.fit().metrics
    assert '"capture/outputs/features/outputs/max"' in (tmp_path / 'metrics.jsonl').read_text()
    assert metrics['train/features'] > 0
    assert metrics['eval/test/loss'] > 0
    programs = [
        trainer_of(model('Classifier', n)).set_up().programs for n in ('Stored', 'Features')
    ]
    assert computation(programs[0].step.executable()) == computation(programs[1].step.executable())


@pytest.mark.slow
def test_linen_and_nnx_models_in_a_notebook() -> None:
    """With the trained variables, in evaluation mode, as the user's own classes."""
    sequential = {
        'target': 'flax.linen:Sequential',
        'layers': (
            {'target': f'{__name__}:Features'},
            {'target': 'flax.linen:Dropout', 'rate': 0.5},
        ),
    }
    linen = trainer_of(sequential)
    linen_model = linen.model(linen.init_state())
    x, _ = images(linen)
    assert same(linen_model(x), linen_model.layers[0](x))
    plain = trainer_of({'target': f'{__name__}:Plain'})
    nnx_model = plain.model(plain.init_state())
    assert isinstance(nnx_model, Plain)
    assert same(nnx_model(x), nnx_model.dense(x.reshape((100, -1))))
    with pytest.raises(UserError, match='no work directory'):
        plain.model()


def test_klinen_modules_created_in_linen_calls_get_the_flag() -> None:
    """Their dropout is active in training and inactive in evaluation."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return nn.remat(knn.Dropout)(0.5)(x), knn.Sequential([nn.Dropout(0.5)])(x)

    dropped, layer = bind(Model())(X)
    assert not same(dropped, X)
    assert not same(layer, X)
    assert all(same(y, X) for y in bind(Model(), 'eval')(X))


BOUND = knn.Dense(10).init_bind(0, X)


def test_a_config_model_must_not_be_bound() -> None:
    """Its weights would be lost silently."""
    with pytest.raises(UserError, match=r'config\.model: Dense is bound.*clone\(\).*init_from'):
        trainer_of({'ref': f'{__name__}:BOUND'})


@pytest.mark.slow
def test_the_docstring() -> None:
    """Its example runs; `tests/test_page_commands.py` runs those of the pages."""
    docstring = knn.__doc__ or ''
    example = '\n'.join(line[4:] for line in docstring.splitlines() if line.startswith('    '))
    names: dict[str, Any] = {'__name__': 'klinen', 'jax': jax, 'nn': nn, 'x': X}
    exec(compile(example, 'klinen', 'exec', dont_inherit=True), names)
    assert names['values'].encoder
