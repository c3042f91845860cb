# SPDX-License-Identifier: Apache-2.0
"""One functional interface over module systems: what the step needs to know of a model."""

from __future__ import annotations

from trainer.modules.linen import Linen
from trainer.step.precision import AS_IS, Precision

# What a Trainer takes for a model.
Functional = Linen


def functional(module: object, precision: Precision = AS_IS) -> Linen:
    """Wraps a user's module for the step functions.

    Args:
        module: a Linen module.
        precision: the dtypes of its parameters, its computation and its output.

    Raises:
        TypeError: if `module` is of no module system that is supported.
    """
    from flax import linen as nn

    if isinstance(module, nn.Module):
        return Linen(module, precision)
    raise TypeError(
        f'config.model: expected an instance of flax.linen.Module, got {type(module).__name__}'
    )
