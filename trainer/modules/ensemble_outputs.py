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
        whose: what returned them, for messages; '' for the model's own call.

    Raises:
        UserError: for an array that has no mean.
    """
    advice = (
        'evaluate with a task that only calls the model itself (config.evals.NAME.task)'
        if whose
        else 'give the task a method combine(outputs)'
    )

    def one(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise UserError(
                f'config.ensemble: {whose or "the model"} returns arrays of {x.dtype}, which have '
                f'no mean over the members; {advice}'
            )
        return x.mean(0)

    return jax.tree.map(one, outputs)


def mean_softmax(logits: jax.Array) -> jax.Array:
    """Returns logits of the mean of the members' probabilities, from logits (members, ..., n)."""
    each = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return jax.nn.logsumexp(each, axis=0) - jnp.log(len(logits))


def mean_sigmoid(logits: jax.Array) -> jax.Array:
    """Returns logits of the mean of the members' probabilities of a yes, elementwise."""
    logits = jnp.asarray(logits, jnp.float32)
    yes = jax.nn.logsumexp(jax.nn.log_sigmoid(logits), axis=0)
    return yes - jax.nn.logsumexp(jax.nn.log_sigmoid(-logits), axis=0)
