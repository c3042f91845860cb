# SPDX-License-Identifier: Apache-2.0
"""The step of a run whose source makes its batches with the model.

Every `num_batches` steps the source collects; the steps in between take one batch after the other
from what it has returned. All of that is in the state: so a run can be saved and resumed at any
step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from trainer.input.collected import Collector, check_batches
from trainer.modules.rng import Keys
from trainer.step.context import Batch, StepContext
from trainer.step.state import TrainState


@flax.struct.dataclass
class Carry:
    """What a collecting run has in its state, in addition to that of any run.

    Attributes:
        source: the carry of the source.
        batches: what the last call of `collect` returned, each (batches, batch size, ...).
    """

    source: Any
    batches: Any


@flax.struct.dataclass
class CollectState:
    """What a source knows of the state.

    Attributes:
        step: int32 scalar, number of steps so far.
        model: called like the model in a task, in evaluation mode.
    """

    step: jax.Array
    model: Any = flax.struct.field(pytree_node=False)


def init(collector: Collector, spec: Mapping[str, Any], seed: int | jax.Array) -> Carry:
    """Returns the first carry.

    Args:
        collector: the source.
        spec: shape and dtype of each field of a batch.
        seed: the seed of the run.
    """
    count = collector.num_batches
    key = Keys(seed=seed, mode='init').stream('collect')
    return Carry(
        source=collector.initial_carry(key),
        batches={name: jnp.zeros((count, *x.shape), x.dtype) for name, x in spec.items()},
    )


def update(
    state: TrainState,
    batch: Batch,
    *,
    collector: Collector,
    ctx: StepContext,
    step: Callable[[TrainState, Batch], TrainState],
) -> TrainState:
    """Returns the state after one step.

    Args:
        state: its `carry` is used and replaced.
        batch: empty.
        collector: the source.
        ctx: the context of the step.
        step: the step `(state, batch) -> state`.
    """
    index = state.step % collector.num_batches
    carry = jax.lax.cond(index == 0, lambda: _collect(state, collector, ctx), lambda: state.carry)
    batch = {
        name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        for name, x in carry.batches.items()
    }
    # The step does not see the carry, and cannot change it.
    new = step(dataclasses.replace(state, carry=None), batch)
    return dataclasses.replace(new, carry=carry)


def _collect(state: TrainState, collector: Collector, ctx: StepContext) -> Carry:
    # In evaluation mode: what acts is the policy as it would be used, without dropout.
    keys = Keys(seed=ctx.seed, mode='eval', step=state.step)
    model = ctx.model.bind(state.variables, keys)
    key = Keys(seed=ctx.seed, mode='train', step=state.step).stream('collect')
    visible = CollectState(step=state.step, model=model)
    batches, source = collector.collect(visible, state.carry.source, key)
    spec = {
        name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in state.carry.batches.items()
    }
    check_batches(batches, spec, collector)
    return Carry(source=source, batches=dict(batches))
