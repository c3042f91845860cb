# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules that optax does not have, for `config.optimizer.learning_rate`."""

from trainer.step.schedules import moved, rsqrt, scaled

__all__ = ['moved', 'rsqrt', 'scaled']
