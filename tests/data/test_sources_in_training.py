# SPDX-License-Identifier: Apache-2.0
"""Sources and loaders under a Trainer: padding, seeds, and invalid sources."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import ROOT
from tests.marks import slow_after
from trainer.config.errors import UserError
from trainer.data.sources import Arrays, ArraySource
from trainer.experiment import Experiment, load_and_build
from trainer.trainer import Trainer


def build(**overrides: Any) -> Experiment:
    """Returns an experiment of the small MLP on a few images."""
    options = {
        'data__source__limit': 100,
        'evals__test__data__source__limit': 100,
        'evals__test__data__batch_size': 48,
        'data__batch_size': 16,
        'train_for': '10 steps',
    }
    return load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**options, **overrides})


def local_target(name: str, **arguments: Any) -> dict[str, Any]:
    return {'target': f'{__name__}:{name}', **arguments}


# ---- padding -----------------------------------------------------------------------------------


def direction_loss(model: Any, batch: Any) -> Any:
    """Divides by the norm of each row: a row of zeros has neither a value nor a gradient."""
    image = batch['image'].reshape(len(batch['image']), -1)
    logits = model(image / jnp.linalg.norm(image, axis=-1, keepdims=True))
    unit = logits / jnp.linalg.norm(logits, axis=-1, keepdims=True)
    loss = ((unit - jax.nn.one_hot(batch['label'], 10)) ** 2).sum(-1)
    return loss, {'scale': 1.0 / image.max(-1)}


@pytest.mark.slow
def test_padding_does_not_change_the_update() -> None:
    """Ten examples in batches of eight: the second update is that of a batch of two."""
    experiment = build(
        data__source__limit=10, data__batch_size=8, data__remainder='pad', train_for='2 steps',
        log__every='1 steps',
        task={'ref': f'{__name__}:direction_loss'}, data__prefetch=1,
        optimizer={'target': 'optax:sgd', 'learning_rate': 0.5, 'momentum': 0.0},
    )  # fmt: skip
    trainer = Trainer(experiment)
    before = jax.device_get(trainer.fit(max_steps=1).state.params)
    result = trainer.fit()
    block = experiment.data.block(1, 1)
    real = {name: x[0, :2] for name, x in block.arrays.items()}
    assert block.arrays['_mask'].tolist() == [[True, True] + [False] * 6]

    def mean_loss(params: Any) -> jax.Array:
        model = experiment.model.module.clone()
        rows = {**real, 'image': real['image'] / np.float32(255)}
        return direction_loss(lambda x: model.apply({'params': params}, x), rows)[0].mean()

    expected = jax.tree.map(lambda p, g: p - 0.5 * g, before, jax.grad(mean_loss)(before))
    for path, value in jax.tree.leaves_with_path(jax.device_get(result.state.params)):
        assert np.isfinite(value).all(), path
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.device_get(result.state.params),
        expected,
    )
    assert all(np.isfinite(value) for value in result.metrics.values())
    # Of 100 images in batches of 48, in the evaluation too.
    assert result.metrics['eval/test/examples'] == 100


@pytest.mark.slow
def test_padding_is_not_in_the_data_digest(tmp_path: pathlib.Path) -> None:
    """Seven examples in one batch of eight have the digest of batches of seven."""
    digests = []
    for batch_size, remainder in [(8, 'pad'), (7, 'carry')]:
        workdir = tmp_path / remainder
        experiment = build(
            data__source__limit=7, data__batch_size=batch_size, data__remainder=remainder,
            mesh={'data': -1, 'model': 8} if batch_size == 7 else {'data': 8}, train_for='3 epochs',
        )  # fmt: skip
        Trainer(experiment, str(workdir)).fit()
        digests.append(json.loads((workdir / 'result.json').read_text())['data_digest'])
    assert digests[0] == digests[1]


# ---- seeds -------------------------------------------------------------------------------------


def first_batch_hash(experiment: Experiment) -> str:
    block = experiment.data.block(0, 1)
    content = [block.arrays[name].tobytes() for name in sorted(block.arrays)]
    return hashlib.sha256(b''.join(content)).hexdigest()


@pytest.mark.slow
def test_a9_the_data_seed_determines_the_order_alone() -> None:
    """The same seed gives the same batches and losses; another data seed only another order."""

    def train(**overrides: Any) -> tuple[str, float, str, list[int]]:
        experiment = build(**overrides)
        trainer = Trainer(experiment)
        init = jax.device_get(trainer.init_state().params)
        weights = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(init))
        epoch = experiment.data.block(0, 5).ids.ravel().tolist()
        loss = trainer.fit().metrics['train/loss']
        return first_batch_hash(experiment), loss, hashlib.sha256(weights).hexdigest(), epoch

    sizes = {'data__source__limit': 80}
    first, again = train(**sizes), train(**sizes)
    assert first == again
    batch, loss, weights, epoch = train(**sizes, data__seed=1)
    assert batch != first[0]
    assert loss != first[1]
    assert weights == first[2]
    assert sorted(epoch) == sorted(first[3]) == list(range(80))
    # And the other way round: another seed of the run alone is another model on the same data.
    batch, loss, weights, epoch = train(**sizes, seed=1, data__seed=0)
    assert (batch, epoch) == (first[0], first[3])
    assert weights != first[2]


# ---- sources that are none ---------------------------------------------------------------------


class Rows:
    """A source that returns more rows than requested."""

    def __init__(self, length: int = 50, more: int = 0):
        self._length, self._more = length, more
        self.spec: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._length

    def gather(self, indices: np.ndarray) -> Arrays:
        rows = len(indices) + self._more
        return {
            'image': np.ones((rows, 28, 28, 1), np.uint8),
            'label': np.zeros(rows, np.int32),
        }


class Listed(Rows):
    def gather(self, indices: np.ndarray) -> Any:
        return [super(Listed, self).gather(indices[i : i + 1]) for i in range(len(indices))]


class Items(Rows):
    gather = property()  # type: ignore[assignment]


class Uneven(ArraySource):
    def __init__(self, images: int, labels: int):
        super().__init__({'image': np.ones((images, 28, 28, 1)), 'label': np.zeros(labels, int)})


SOURCES = [
    (local_target('Rows', more=1), r"gather of the source Rows returned 'image' of shape \(4, 28,"),
    (local_target('Rows', more=-2), 'for 3 indices; expected one row per index, in the same order'),
    (local_target('Listed'), 'gather of the source Listed returned list; expected a dict of'),
    (
        local_target('Items'),
        'the source Items has no gather.* trainer.data.sources:RandomAccessSource',
    ),
    (
        local_target('Uneven', images=5, labels=6),
        r"the same positive length.*\{'image': 5, 'label': 6\}",
    ),
    (local_target('Uneven', images=0, labels=0), "the same positive length.*'image': 0"),
]


@pytest.mark.parametrize(('source', 'message'), SOURCES)
def test_an_invalid_training_source_is_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f'^config.data.*{message}'):
        build(data__source=source)


@pytest.mark.parametrize(('source', 'message'), slow_after(1, SOURCES))
def test_an_invalid_evaluation_source_is_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f'^config.evals.test.data.*{message}'):
        Trainer(build(evals__test__data__source=source)).fit()


@pytest.mark.slow
def test_empty_splits() -> None:
    empty = local_target('Rows', length=0)
    with pytest.raises(UserError, match=r'^config.data: .*Rows is empty; name a split or files'):
        build(data__source=empty)
    with pytest.raises(UserError, match=r'^config.evals.test.data: the split is empty; use one'):
        Trainer(build(evals__test__data__source=empty)).fit()


class Broken(Rows):
    def gather(self, indices: np.ndarray) -> Arrays:
        raise ValueError('operands could not be broadcast together')


@pytest.mark.slow
def test_an_error_inside_gather_keeps_its_traceback() -> None:
    experiment = build(data__source=local_target('Broken'))
    with pytest.raises(ValueError, match='operands could not') as error:
        Trainer(experiment).fit()
    assert not isinstance(error.value, UserError)
    assert error.traceback[-1].name == 'gather'


class Shrinking(Rows):
    """A source that returns too few rows after the first calls."""

    def gather(self, indices: np.ndarray) -> Arrays:
        arrays = super().gather(indices)
        return {**arrays, 'label': arrays['label'][:-1]} if 33 in indices else arrays


@pytest.mark.slow
def test_a_source_that_later_returns_too_few_rows() -> None:
    with pytest.raises(ValueError, match=r"source Shrinking returned 'label' of shape"):
        Trainer(build(data__source=local_target('Shrinking'))).fit()


@pytest.mark.slow
@pytest.mark.parametrize('remainder', ['carry', 'pad', 'drop'])
def test_a_batch_larger_than_the_source(remainder: str) -> None:
    options = {
        'data__source__limit': 5,
        'data__remainder': remainder,
        'train_for': '8 epochs',
        'evals__test__data__source__limit': 3,
    }
    if remainder == 'drop':
        with pytest.raises(UserError, match=r"^config.data: .* use 'carry' or 'pad'"):
            build(**options)
        return
    result = Trainer(build(**options)).fit()
    assert result.step == {'carry': 3, 'pad': 8}[remainder]  # 40 rows in batches of 16, or 8 epochs
    assert np.isfinite(result.metrics['train/loss'])
    assert result.metrics['eval/test/examples'] == 3
