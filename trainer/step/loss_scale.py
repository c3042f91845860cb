# SPDX-License-Identifier: Apache-2.0
"""The dynamic loss scale, which keeps float16 gradients from underflowing."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trainer.modules.precision import accumulation_dtype
from trainer.tasks.metrics import Last

# Below 1 it would no longer protect against underflow, and an overflow has another cause.
_SMALLEST = 1.0


@flax.struct.dataclass
class LossScale:
    """A factor on the loss that grows while gradients are finite, and shrinks otherwise.

    The constants are those of `flax.training.dynamic_scale`: the scale doubles after 2,000 finite
    steps in a row and halves at each step that is not; it never falls below 1.

    Attributes:
        scale: float32 scalar.
        finite_steps: int32 scalar, finite steps since the scale last changed.
        skipped: int32 scalar, updates skipped so far.
        growth_interval: number of finite steps in a row after which the scale doubles.
    """

    scale: jax.Array
    finite_steps: jax.Array
    skipped: jax.Array
    growth_interval: int = flax.struct.field(pytree_node=False, default=2000)

    @classmethod
    def from_value(cls, scale: float) -> LossScale:
        """Returns the scale before the first step."""
        zero = jnp.zeros((), jnp.int32)
        # A copy, because two leaves of a donated state must not share a buffer.
        return cls(scale=jnp.float32(scale), finite_steps=zero, skipped=jnp.copy(zero))

    @property
    def is_smallest(self) -> jax.Array:
        """Whether the scale cannot shrink further: bool scalar."""
        return self.scale <= _SMALLEST

    def metrics(self) -> dict[str, jax.Array]:
        """Returns its entries of a row of metrics."""
        return {'loss_scale': self.scale, 'skipped_updates': self.skipped}

    def update(self, finite: jax.Array) -> LossScale:
        """Returns the scale for the next step.

        Args:
            finite: bool scalar, whether this step's gradients were finite.
        """
        finite_steps = jnp.where(finite, self.finite_steps + 1, 0)
        grow = finite_steps >= self.growth_interval
        # A power of two, so that scaling and unscaling are exact; 2^127 is the largest in float32.
        grown = jnp.where(grow, jnp.minimum(self.scale * 2, 2.0**127), self.scale)
        shrunk = jnp.maximum(self.scale / 2, _SMALLEST)
        return dataclasses.replace(
            self,
            scale=jnp.where(finite, grown, shrunk),
            finite_steps=jnp.where(grow, 0, finite_steps),
            skipped=self.skipped + ~finite,
        )


def choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """Returns `new` where the scalar condition holds, `old` otherwise, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def to_optimizer_gradients(grads: Any, scale: LossScale | None) -> Any:
    """Converts gradients of JAX to those that optimizers expect: float32, unscaled, conjugate."""

    def convert(grad: jax.Array) -> jax.Array:
        # Before the division: unscaled, small gradients would underflow in float16.
        grad = grad.astype(accumulation_dtype(grad))
        grad = grad if scale is None else grad / scale.scale
        # JAX's gradient of a complex parameter is the conjugate of the direction of ascent.
        return grad.conj() if jnp.iscomplexobj(grad) else grad

    return jax.tree.map(convert, grads)


def skip_overflow(new: Any, old: Any, updates: Any, finite: jax.Array) -> tuple[Any, Any, Any]:
    """Adapts the scale, and undoes the update if its gradients are not finite.

    Args:
        new: the state after the update.
        old: the state before the update.
        updates: the updates that were added to the parameters.
        finite: bool scalar, whether all gradients are finite.

    Returns:
        The state, the updates (zero if they were undone), and the metrics of the scale.
    """
    scale = old.loss_scale.update(finite)
    # Not `step`, which counts batches. The collections too, because an overflow may come from the
    # forward pass that has updated them.
    skipped = ('params', 'opt_state', 'collections', 'ema')
    new = dataclasses.replace(new.revert_if(~finite, old, skipped), loss_scale=scale)
    metrics = {name: Last.from_model_output(value) for name, value in scale.metrics().items()}
    return new, choose(finite, updates, jax.tree.map(jnp.zeros_like, updates)), metrics
