# SPDX-License-Identifier: Apache-2.0
"""Modules, and helpers that initialize and bind them, for the tests of the functional interface."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
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


class Normed(nn.Module):
    """Statistics, two RNG streams, and submodules that can be called separately."""

    fixed: bool | None = None

    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.norm = nn.BatchNorm(momentum=0.5, use_running_average=self.fixed)
        self.drop = nn.Dropout(0.5)
        self.block = Block()

    def __call__(self, x: Any, train: bool) -> Any:
        average = None if self.fixed is not None else not train
        return self.drop(self.norm(self.dense(x), use_running_average=average), not train)

    def encode(self, x: Any) -> Any:
        return self.dense(x)

    def noisy(self, x: Any, training: bool) -> Any:
        return x + jax.random.normal(self.make_rng('noise'), x.shape) * training


class Block(nn.Module):
    def setup(self) -> None:
        self.inner = nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def everything(model: Any, batch: Any) -> Any:
    return model(batch['x']), model.block(batch['x']), model.noisy(batch['x'])
