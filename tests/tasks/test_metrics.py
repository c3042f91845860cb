# SPDX-License-Identifier: Apache-2.0
"""Weighted means, and the names of metrics that are not finite."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.tasks.metrics import WeightedMean, non_finite_names


def test_mean_of_no_examples_is_not_a_failure() -> None:
    nothing, bad = WeightedMean.empty(), WeightedMean.from_model_output(jnp.array([jnp.nan, 1.0]))
    masked = WeightedMean.from_model_output(jnp.array([jnp.nan]), jnp.zeros(1))
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': masked}}) == []
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': bad}}) == ['b_loss']


def test_mean_of_no_examples_on_the_host_is_not_a_warning() -> None:
    zero = np.zeros((), np.float32)
    assert np.isnan(WeightedMean(total=zero, weight=zero).compute())


def test_the_mean_of_batches_of_different_weights_is_exact() -> None:
    first = WeightedMean.from_model_output(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5]))
    second = WeightedMean.from_model_output(jnp.array([4.0]))
    assert first.merge(second).compute() == (1 + 1 + 4) / 2.5
    assert WeightedMean.empty().merge(second).compute() == 4
    assert jnp.isnan(WeightedMean.empty().compute())


def test_a_value_of_weight_0_may_be_anything() -> None:
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    assert WeightedMean.from_model_output(values, jnp.array([2.0, 0.0, 0.0])).compute() == 1


def test_named_outputs_are_averaged_with_named_weights() -> None:
    kind = WeightedMean.from_output('hits', weighted_by='rows')
    outputs = {'hits': jnp.array([[1.0, 3.0], [5.0, 7.0]]), 'rows': jnp.array([1.0, 0.0])}
    assert kind.from_model_output(**outputs, weights=None).compute() == 2
    with pytest.raises(UserError, match="the metric 'hits' of the task: expected an array with"):
        kind.from_model_output(hits=jnp.ones(3), rows=jnp.ones(2))


def test_a_value_of_a_sequence_counts_by_the_largest_weight_of_its_tokens() -> None:
    """So padding does not count, and a sequence counts once, whatever its length."""
    kind = WeightedMean.from_output('exact')
    outputs = {
        'exact': jnp.array([1.0, 0.0, jnp.nan]),
        'weights': jnp.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    metric = kind.from_model_output(**outputs)
    assert metric.compute() == 0.5
    assert metric.weight == 2
    with pytest.raises(UserError, match=r'weights of shape \(2,\) do not fit'):
        kind.from_model_output(exact=jnp.ones(3), weights=jnp.ones((2, 4)))
