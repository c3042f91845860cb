# SPDX-License-Identifier: Apache-2.0
"""Mixtures: proportions, the length of an epoch, and the order of examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.data.loader import TrainLoader
from trainer.data.mixture import Mixture
from trainer.data.sources import ArraySource
from trainer.experiment import load_and_build
from trainer.trainer import Trainer


def source(start: int, length: int, **more: Any) -> ArraySource:
    return ArraySource({'x': np.arange(start, start + length), **more})


def counts(mixture: Mixture) -> np.ndarray:
    """Returns how often each value occurs in an epoch."""
    return np.bincount(mixture.gather(np.arange(len(mixture)))['x'])


def test_without_weights_every_example_occurs_once() -> None:
    mixture = Mixture((source(0, 5), source(5, 3)))
    assert len(mixture) == 8
    assert counts(mixture).tolist() == [1] * 8


@pytest.mark.parametrize('weights', [(1, 1), (0.5, 0.5), (3, 1), (1, 3), (1, 0.01)])
def test_proportions(weights: tuple[float, float]) -> None:
    """The share of each source is its weight, to half an example; none is left out."""
    mixture = Mixture((source(0, 60), source(60, 15)), weights)
    found = counts(mixture)
    parts = np.array([found[:60].sum(), found[60:].sum()])
    assert parts.sum() == len(mixture)
    assert abs(parts - np.array(weights) / sum(weights) * len(mixture)).max() <= 0.5
    assert found.min() == 1
    for part in (found[:60], found[60:]):
        assert part.max() - part.min() <= 1  # As evenly as they can.


def test_rows_are_in_the_order_of_the_indices() -> None:
    mixture = Mixture((source(0, 4), source(10, 2)), (1, 1))
    assert mixture.gather(np.array([7, 0, 4, 3, 5]))['x'].tolist() == [11, 0, 10, 3, 11]
    assert mixture.spec == source(0, 4).spec
    assert mixture.describe(6) == 'example 0 of the source ArraySource'


def test_batches_are_mixed_and_a_function_of_their_position() -> None:
    loader = TrainLoader(source=Mixture((source(0, 900), source(900, 100)), (1, 1)), batch_size=60)
    again = TrainLoader(source=Mixture((source(0, 900), source(900, 100)), (1, 1)), batch_size=60)
    batches = loader.block(0, 90).arrays['x']
    assert np.array_equal(batches[70:75], again.block(70, 5).arrays['x'])
    share = (batches >= 900).mean(1)
    assert abs(share.mean() - 0.5) < 0.01
    # Of 60 rows drawn at random from two halves: six standard deviations.
    assert abs(share - 0.5).max() < 6 * 0.5 / 60**0.5


@pytest.mark.parametrize(
    ('sources', 'weights', 'message'),
    [
        ((), None, 'sources: expected non-empty sources'),
        ((source(0, 3),), (1, 2), 'for each of 1 sources'),
        ((source(0, 3), source(0, 3)), (1, 0), 'expected a positive number'),
        ((source(0, 3), source(0, 3)), (1, float('nan')), 'expected a positive number'),
        ((source(0, 3), source(0, 3, y=np.zeros(3))), None, r'source 1 has x: int64\[\], y'),
    ],
)
def test_sources_that_cannot_be_mixed(sources: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(sources, weights)


@pytest.mark.slow
def test_from_a_config() -> None:
    mnist = {'target': 'trainer.data.mnist:MNIST', 'split': 'train', 'limit': 100}
    test = {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 40}
    mixture = {
        'target': 'trainer.data.mixture:Mixture',
        'sources': (mnist, test),
        'weights': (3, 1),
    }
    options = {'train_for': '1 epochs', 'evals': {}, 'data__source': mixture}
    config = str(ROOT / 'configs' / 'mnist_mlp.py')
    experiment = load_and_build(config, **options)
    assert experiment.data.examples == 120 + 40
    assert Trainer(experiment).fit().step == 5
    with pytest.raises(UserError, match=r'config.data.source: .* refused its arguments: weights'):
        load_and_build(config, **{**options, 'data__source__weights': (3, -1)})


def test_it_has_the_vocabulary_of_its_sources() -> None:
    """By which the trainer refuses a model of other tokens; bytes, for example, have none."""
    sources = [source(0, 2), source(2, 2), source(4, 2), source(6, 2)]
    for one, vocabulary in zip(sources, ('a1', None, {'the': 0}, 'a1'), strict=True):
        one.vocabulary = vocabulary  # type: ignore[attr-defined]
    loader = TrainLoader(source=Mixture(sources), batch_size=2)
    assert loader.vocabulary == 'a1'
    assert Mixture(sources[1:3]).vocabulary is None
    sources[3].vocabulary = 'b2'  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r'different vocabularies.*source 0 has a1, source 3 has b2'
    ):
        Mixture(sources)
