# SPDX-License-Identifier: Apache-2.0
"""Reads and writes hyperparameters in the optimizer state, where they can differ by member."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

# Numbers by key path below `config.optimizer`: {'learning_rate.factor': 0.5}; they may be traced.
Values = Mapping[str, Any]


def read(opt_state: Any, paths: Iterable[str]) -> dict[str, jax.Array]:
    """Returns the numbers at these key paths (below `config.optimizer`) from the state."""
    by_name: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=_is_hyperparams_state):
        if _is_hyperparams_state(node):
            by_name.update(node.hyperparams)
    return {path: by_name[hyperparam_name(path)] for path in paths}


def write(opt_state: Any, values: Values) -> Any:
    """Returns an optimizer's state with new numbers at these key paths, sharded like the old."""
    named = {hyperparam_name(path): value for path, value in values.items()}

    def write(node: Any) -> Any:
        if not _is_hyperparams_state(node):
            return node
        new = {
            name: jax.device_put(np.asarray(named[name], old.dtype), old.sharding)
            for name, old in node.hyperparams.items()
            if name in named
        }
        return node._replace(hyperparams={**node.hyperparams, **new})

    return jax.tree.map(write, opt_state, is_leaf=_is_hyperparams_state)


def _is_hyperparams_state(node: Any) -> bool:
    return isinstance(node, optax.InjectStatefulHyperparamsState)


def hyperparam_name(path: str) -> str:
    """Returns the name of a key path in an optimizer's state: 'learning_rate__factor'."""
    # optax passes hyperparameters as keyword arguments, so they must be identifiers.
    return re.sub(r'\W+', '__', path).strip('_')
