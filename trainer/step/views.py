# SPDX-License-Identifier: Apache-2.0
"""The optimizer's view of the parameters: half precision as float32, complex numbers as two reals.

In float16, Adam's `eps` and the squares of small gradients underflow to 0; in bfloat16, sums lose
small terms. Most optimizers are wrong for complex numbers, because their squares and signs are
those of real ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError, and_more
from trainer.modules.model_view import param_path
from trainer.modules.precision import accumulation_dtype


class RealAndImaginary(NamedTuple):
    """The real view of a complex parameter, its gradient, or its optimizer state.

    Attributes:
        real: real part of a complex array.
        imaginary: imaginary part, of the same shape and dtype.
    """

    real: Any
    imaginary: Any


def is_pair(x: Any) -> bool:
    """Whether this is the real view of a complex array."""
    return isinstance(x, RealAndImaginary)


def is_complex(x: Any) -> bool:
    """Whether an array, or its abstract shape, is complex."""
    return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.complexfloating)


def to_float32(tree: Any) -> Any:
    """Returns the tree with half-precision leaves in float32."""
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x)), tree)


def split(tree: Any) -> Any:
    """Returns the tree with each complex array as a pair of real ones."""
    return jax.tree.map(lambda x: RealAndImaginary(x.real, x.imag) if is_complex(x) else x, tree)


def merge(tree: Any) -> Any:
    """Returns the tree with pairs merged into complex arrays: the inverse of `split`."""
    return jax.tree.map(_merge_pair, tree, is_leaf=is_pair)


def _merge_pair(x: Any) -> Any:
    if not is_pair(x):
        return x
    floats = [hasattr(part, 'dtype') and jnp.issubdtype(part.dtype, jnp.floating) for part in x]
    if not all(floats):
        return x  # A count (integers), or a masked leaf.
    return jax.lax.complex(*(part.astype(accumulation_dtype(part)) for part in x))


def with_float32_view(
    tx: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
    """Returns an optimizer that works in float32 for half-precision parameters.

    Its updates are float32 too: `optax.apply_updates` adds in float32 and rounds the sum.
    """
    if not any(x.dtype != accumulation_dtype(x) for x in jax.tree.leaves(params)):
        return tx
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(to_float32(params))

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        # The extra argument `grad` has to match the updates.
        if 'grad' in more:
            more['grad'] = to_float32(more['grad'])
        return inner.update(to_float32(updates), state, to_float32(params), **more)

    return optax.GradientTransformationExtraArgs(init, update)


def with_real_view(tx: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    """Returns an optimizer that sees each complex parameter as two real ones.

    Like `optax.contrib.split_real_and_imaginary`, but its state for a complex parameter is complex
    too: slots have the parameter's path, shape and sharding.
    """
    if not any(map(is_complex, jax.tree.leaves(params))):
        return tx
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return merge(inner.init(split(params)))

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        # The extra arguments too: `grad` has complex leaves, functions stay as they are.
        updates, state = inner.update(split(updates), split(state), split(params), **split(more))
        return merge(updates), merge(state)

    return optax.GradientTransformationExtraArgs(init, update)


def complete_params(tree: Any, params: Any) -> Any:
    """Returns parameters for the model, from the optimizer's view of them.

    Args:
        tree: like `params`, with pairs for complex numbers, float32 for halves, and masked leaves
            for parameters that the optimizer does not train.
        params: all parameters of the model; they replace the masked leaves.

    Raises:
        UserError: if the trees have different structures.
    """

    def complete(new: Any, old: jax.Array) -> jax.Array:
        return old if isinstance(new, optax.MaskedNode) else _merge_pair(new).astype(old.dtype)

    def is_leaf(x: Any) -> bool:
        return is_pair(x) or isinstance(x, optax.MaskedNode)

    # Optimizers such as optax:flatten call the loss with a tree of another structure.
    try:
        return jax.tree.map(complete, tree, params, is_leaf=is_leaf)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            'config.optimizer: the optimizer evaluates the loss at parameters of another structure '
            "than the model's (such as the single vector of optax:flatten). Remove the "
            f'transformation that changes their structure: {error}'
        ) from error


def check_arrays(variables: Any) -> None:
    """Checks that all variables of a model are arrays or numbers.

    Raises:
        UserError: naming those that are not, such as text.
    """
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    other = [
        f'{param_path(path)} ({type(x).__name__})'
        for path, x in leaves
        if not hasattr(x, 'dtype') and not isinstance(x, complex | float | int)
    ]
    if other:
        raise UserError(
            f'the model has {and_more(other, 5)} among its variables, which must be arrays, '
            'because they are part of checkpoints. Store other objects in attributes of the module'
        )


def check_numbers(params: Any) -> None:
    """Checks that all parameters are floating-point or complex.

    Raises:
        UserError: naming those that are not, such as integers; frozen ones too, because gradients
            are taken with respect to all of 'params'.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    other = [
        f'{param_path(path)} ({x.dtype})'
        for path, x in leaves
        if not jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    if other:
        raise UserError(
            f'the model has {and_more(other, 5)} among its parameters, which must be '
            'floating-point or complex: gradients are taken with respect to all of them, including '
            'those in config.optimizer.freeze. Use another collection: '
            "self.variable('constants', NAME, ...) in a Linen module, a subclass of nnx.Variable "
            'other than nnx.Param in an NNX one'
        )


def contains_state(opt_state: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether an optimizer state contains a state of this type."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(x, kind) for x in nodes)
