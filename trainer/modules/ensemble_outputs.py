# SPDX-License-Identifier: Apache-2.0
"""Combines the outputs of an ensemble's members."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError


def mean(outputs: Any, *, whose: str = '') -> Any:
    """Returns the mean over the members of each array of a stacked output.

    Args:
        outputs: pytree of arrays (members, ...).
        whose: what returned them, for error messages; '' for the model's own call.

    Raises:
        UserError: for an array that is not floating-point.
    """
    advice = (
        'evaluate with a task that only calls the model itself (config.evals.NAME.task)'
        if whose
        else 'give the task a method combine(outputs)'
    )

    def member_mean(x: jax.Array) -> jax.Array:
        # The mean of class indices or counts would be a number without a meaning.
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise UserError(
                f'config.ensemble: {whose or "the model"} returns arrays of {x.dtype}, which '
                f'cannot be averaged over the members; {advice}'
            )
        return x.mean(0)

    return jax.tree.map(member_mean, outputs)


def mean_softmax(logits: jax.Array) -> jax.Array:
    """Returns logits of the mean of the members' probabilities, from logits (members, ..., n)."""
    # In log space: probabilities would underflow, and their logarithms be infinite.
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(logits))


def mean_sigmoid(logits: jax.Array) -> jax.Array:
    """Returns logits of the mean of the members' sigmoid probabilities, elementwise."""
    logits = jnp.asarray(logits, jnp.float32)
    # The logit of a mean is log(sum p) - log(sum (1 - p)): the number of members cancels.
    positive = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=0)
    return positive - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=0)
