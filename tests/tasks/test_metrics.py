# SPDX-License-Identifier: Apache-2.0
"""Weighted means, and the names of metrics that are not finite."""

from __future__ import annotations

import jax.numpy as jnp

from trainer.tasks.metrics import WeightedMean, non_finite_names


def test_mean_of_no_examples_is_not_a_failure() -> None:
    nothing, bad = WeightedMean.empty(), WeightedMean.from_model_output(jnp.array([jnp.nan, 1.0]))
    masked = WeightedMean.from_model_output(jnp.array([jnp.nan]), jnp.zeros(1))
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': masked}}) == []
    assert non_finite_names({'task': {'a_loss': nothing, 'b_loss': bad}}) == ['b_loss']
