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
from trainer.ensemble.hyperparams import Values, name_of

# How JAX says that a number must be known before the program runs.
_NEEDS_TO_KNOW = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def placed(node: Node, values: Values) -> Node:
    """Returns an optimizer's node with these numbers in it."""
    for path, value in values.items():
        node = paths.changed(node, paths.parse(path), value)
    return node


def injected(
    node: Node,
    where: str,
    values: Values,
    *,
    prefix: str = '',
    changed: Callable[[Node], Node] = lambda node: node,
) -> optax.GradientTransformation:
    """Returns the optimizer of a node, with these numbers in its state.

    Args:
        node: names the optimizer.
        where: its config path, for messages.
        values: first values.
        prefix: what the names in the state begin with: no two optimizers of a run may share one.
        changed: applied to the node once the numbers are in it.
    """
    names = {name_of(prefix + path): path for path in values}

    def make(**numbers: Any) -> optax.GradientTransformation:
        inner = {names[name]: number for name, number in numbers.items()}
        with _one_program(where, inner):
            made = targets.instantiate(changed(placed(node, inner)), where)
            return _in_its_dtypes(made, where, inner)

    make(**{name: values[path] for name, path in names.items()})  # Or it would refuse them later.
    # What `optax.inject_hyperparams` reads the names from.
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Not in the dtype of the parameters: 0.999 is 1 in bfloat16.
    inject = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    return inject(**{name: values[path] for name, path in names.items()})


@contextlib.contextmanager
def _one_program(where: str, values: Values) -> Iterator[None]:
    """Explains what JAX says where an optimizer needs to know a number to be traced."""
    try:
        yield
    except (UserError, *_NEEDS_TO_KNOW) as error:
        who = where
        if isinstance(error, UserError):
            if not isinstance(error.__cause__, _NEEDS_TO_KNOW):
                raise
            who = str(error).partition(' refused its arguments')[0]
        raise UserError(
            f'{who} decides by a number what to compute, so one program cannot have several values '
            f'of {" or ".join(values)} (config.ensemble.vary)'
        ) from error


def _in_its_dtypes(
    inner: optax.GradientTransformation, where: str, values: Values
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose state has the dtypes that it began with.

    A number that is an array makes float32 of what a Python number leaves in bfloat16.
    """
    tx = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        with _one_program(where, values):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        with _one_program(where, values):
            updates, after = tx.update(updates, state, params, **more)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformationExtraArgs(init, update)
