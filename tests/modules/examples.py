# SPDX-License-Identifier: Apache-2.0
"""Helpers that initialize and bind modules, for the tests of the functional interface."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from trainer.modules.functional import as_functional
from trainer.modules.model_view import BoundModel
from trainer.modules.rng import Keys

X = jnp.arange(12.0).reshape(3, 4)


def init(module: nn.Module, task: Any = None) -> Any:
    """Returns the variables of everything that the task calls, by default the module itself."""
    task = task or (lambda model, batch: model(batch['x']))
    return as_functional(module).init(task, {'x': X}, Keys(seed=0, mode='init'))


def bind(module: nn.Module, mode: str = 'train', *, task: Any = None, **options: Any) -> BoundModel:
    """Returns the bound model that a task gets in step 3, with fresh variables."""
    keys = Keys(seed=0, mode=mode, step=3)
    return as_functional(module).bind(init(module, task), keys, **options)


def same(a: Any, b: Any) -> bool:
    """Whether two arrays are bitwise equal."""
    return bool(jnp.array_equal(a, b))
