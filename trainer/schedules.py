# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules missing from optax, for `config.optimizer.learning_rate`."""

from trainer.step.schedules import rsqrt, scale, shift

__all__ = ['rsqrt', 'scale', 'shift']
