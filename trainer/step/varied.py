# SPDX-License-Identifier: Apache-2.0
"""Optimizers some of whose numbers live in their state, and may differ from member to member."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from trainer.config import paths, targets
from trainer.config.errors import UserError
from trainer.config.sections import Node

# Numbers by path below the optimizer's node: {'learning_rate.factor': 0.5}; they may be traced.
Values = Mapping[str, Any]


def placed(node: Node, values: Values) -> Node:
    """Returns an optimizer's node with these numbers in it."""
    for path, value in values.items():
        node = paths.changed(node, paths.parse(path), value)
    return node


def injected(
    node: Node, where: str, values: Values, *, prefix: str = ''
) -> optax.GradientTransformation:
    """Returns the optimizer of a node, with these numbers in its state.

    Args:
        node: names the optimizer.
        where: its config path, for messages.
        values: first values.
        prefix: what the names in the state begin with: no two optimizers of a run may share one.
    """
    names = {name_of(prefix + path): path for path in values}

    def make(**numbers: Any) -> optax.GradientTransformation:
        inner = {names[name]: number for name, number in numbers.items()}
        try:
            return targets.instantiate(placed(node, inner), where)
        except UserError as error:
            if not isinstance(error.__cause__, jax.errors.TracerBoolConversionError):
                raise
            who = str(error).partition(': Attempted')[0]
            raise UserError(
                f'{who}: it decides by a number what to compute, so one program cannot have '
                f'several values of {" or ".join(inner)} (config.ensemble.vary)'
            ) from error

    make(**{name: values[path] for name, path in names.items()})  # Or it would refuse them later.
    # What `optax.inject_hyperparams` reads the names from.
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return optax.inject_hyperparams(make)(**{n: values[path] for n, path in names.items()})


def read(opt_state: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Returns the numbers of these paths (below `config.optimizer`) from an optimizer's state."""

    def is_found(node: Any) -> bool:
        return isinstance(node, optax.InjectStatefulHyperparamsState)

    found: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=is_found):
        if is_found(node):
            found.update(node.hyperparams)
    return {name: found[name_of(name)] for name in names}


def name_of(path: str) -> str:
    """Returns the name of a path in an optimizer's state: 'learning_rate__factor'."""
    return re.sub(r'\W+', '__', path).strip('_')
