# SPDX-License-Identifier: Apache-2.0
"""Puts hyperparameters into the optimizer's state, so that ensemble members can differ."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config import paths, targets
from trainer.config.errors import UserError
from trainer.config.sections import Node
from trainer.ensemble.hyperparams import Values, hyperparam_name

# Errors that JAX raises if Python code needs the concrete value of a traced number.
_CONCRETIZATION_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def insert_values(node: Node, values: Values) -> Node:
    """Returns an optimizer's node with these values at their key paths."""
    for path, value in values.items():
        node = paths.with_value(node, paths.parse(path), value)
    return node


def inject(
    node: Node,
    where: str,
    values: Values,
    *,
    prefix: str = '',
    changed: Callable[[Node], Node] = lambda node: node,
) -> optax.GradientTransformation:
    """Returns the optimizer of a node, with these hyperparameters in its state.

    Args:
        node: the optimizer's node.
        where: its config path, for messages.
        values: initial values by key path.
        prefix: prefix of the names in the state, unique to this optimizer.
        changed: converts the node after the values are inserted.
    """
    names = {hyperparam_name(prefix + path): path for path in values}

    def make(**numbers: Any) -> optax.GradientTransformation:
        inner = {names[name]: number for name, number in numbers.items()}
        with _explain_concretization(where, inner):
            optimizer = targets.instantiate(changed(insert_values(node, inner)), where)
            return _keep_dtypes(optimizer, where, inner)

    # Call it once with plain numbers, so that an invalid value is reported here.
    make(**{name: values[path] for name, path in names.items()})
    # `optax.inject_hyperparams` reads the names from the signature.
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Not the dtype of the parameters, optax's default: in bfloat16, 0.999 would be 1.
    inject = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    return inject(**{name: values[path] for name, path in names.items()})


@contextlib.contextmanager
def _explain_concretization(where: str, values: Values) -> Iterator[None]:
    """Explains errors of JAX about an optimizer that needs the concrete value of a number."""
    try:
        yield
    # `targets.instantiate` wraps errors of constructors.
    except (targets.RefusedArguments, *_CONCRETIZATION_ERRORS) as error:
        who = where
        if isinstance(error, targets.RefusedArguments):
            if not isinstance(error.__cause__, _CONCRETIZATION_ERRORS):
                raise
            who = error.who
        raise UserError(
            f'{who} branches in Python on {" or ".join(values)}, so it cannot differ between '
            'ensemble members (config.ensemble.vary)'
        ) from error


def _keep_dtypes(
    inner: optax.GradientTransformation, where: str, values: Values
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose updates keep the dtypes of its initial state.

    A hyperparameter in the state is a float32 array, which promotes bfloat16 arrays; a Python
    number would not.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        with _explain_concretization(where, values):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        with _explain_concretization(where, values):
            updates, after = tx.update(updates, state, params, **more)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformationExtraArgs(init, update)
