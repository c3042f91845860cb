# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters in the optimizer state, which can differ between members of an ensemble."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

# Numbers by path below the optimizer's node: {'learning_rate.factor': 0.5}; they may be traced.
Values = Mapping[str, Any]


def read(opt_state: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Returns the numbers of these paths (below `config.optimizer`) from an optimizer's state."""
    found: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=_is_hyperparams_state):
        if _is_hyperparams_state(node):
            found.update(node.hyperparams)
    return {name: found[hyperparam_name(name)] for name in names}


def write(opt_state: Any, values: Values) -> Any:
    """Returns an optimizer's state with other numbers at these paths, where the old ones were."""
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
    """Returns the name of a path in an optimizer's state: 'learning_rate__factor'."""
    return re.sub(r'\W+', '__', path).strip('_')
