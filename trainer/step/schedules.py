# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules that optax lacks: functions of the number of updates."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def rsqrt(peak_value: float, warmup_steps: int) -> optax.Schedule:
    """Returns a linear warmup to the peak, followed by decay with the inverse root of the step.

    See "Attention Is All You Need" (Vaswani et al., 2017), section 5.3.

    Args:
        peak_value: the rate after the warmup.
        warmup_steps: number of updates of the warmup, at least 1.
    """
    if warmup_steps < 1:
        raise ValueError(f'warmup_steps: expected at least 1, got {warmup_steps}')

    def schedule(count: optax.ScalarOrSchedule) -> jnp.ndarray:
        # The clamp to `warmup_steps` keeps the root finite at step 0, where `minimum` ignores it.
        step = jnp.asarray(count, jnp.float32)
        decay = jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))
        return peak_value * jnp.minimum(step / warmup_steps, decay)

    return schedule


def scale(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    """Returns a schedule times a factor, which can differ between members of an ensemble.

    Args:
        schedule: function of the number of updates.
        factor: the factor, a number or a traced scalar.
    """
    return lambda count: factor * schedule(count)


def shift(schedule: optax.Schedule, by: float) -> optax.Schedule:
    """Returns a schedule shifted in time: its value at update 0 is that of `schedule` at `by`.

    Args:
        schedule: function of the number of updates.
        by: number of updates to shift by.
    """
    return lambda count: schedule(count + by)
