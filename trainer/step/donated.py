# SPDX-License-Identifier: Apache-2.0
"""Detects and explains the use of states that were donated to a later step."""

from __future__ import annotations

from typing import Any

import jax

from trainer import compat

_ADVICE = (
    'Each step reuses the memory of the state before it (donation), so a state is gone once '
    'training continues. Keep a copy: jax.tree.map(jnp.copy, state) on the devices, or '
    'jax.device_get(state) on the host'
)


class DonatedError(RuntimeError):
    """A state was used after it had been donated to a later step."""


def is_donated(state: Any) -> bool:
    """Whether arrays of a state, or of any pytree, were donated to a step."""
    return any(x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array))


def check(state: Any, what: str) -> None:
    """Checks that a state can still be used.

    Args:
        state: a state, its shapes, or None.
        what: such as 'event.state', for the message.

    Raises:
        DonatedError: if its arrays were donated to a step.
    """
    if is_donated(state):
        raise DonatedError(f'{what}: the arrays of this state were deleted. {_ADVICE}')


def explain(error: BaseException) -> None:
    """Adds a note to JAX's error about a deleted array: why it was deleted, and what to do."""
    if compat.is_deleted_array(error) and not isinstance(error, DonatedError):
        error.add_note(f'It probably belongs to a state that a hook or a notebook kept. {_ADVICE}')
