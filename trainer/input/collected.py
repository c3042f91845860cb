# SPDX-License-Identifier: Apache-2.0
"""Data that depends on the model: the source of a run that makes its batches on the devices.

In `config.data.source`, an object with a method `collect` takes the place of a source of examples.
A rollout of reinforcement learning is the usual case: the policy that is trained plays, and what it
has seen is trained on. See docs/howto/collect.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.loader import ALL, Rows
from trainer.modules.seen import describe


class Collector(Protocol):
    """A source that makes batches with the model, on the devices.

    Its methods are compiled with the train step, so they may use only JAX.

    Attributes:
        spec: shape, without the batch dimension, and dtype of each field of a batch.
        num_batches: how many batches one call of `collect` returns.
    """

    @property
    def spec(self) -> Mapping[str, Any]:
        """See above."""
        ...

    @property
    def num_batches(self) -> int:
        """See above."""
        ...

    def initial_carry(self, key: jax.Array) -> Any:
        """Returns what the first call of `collect` gets as `carry`: arrays in any pytree."""
        ...

    def collect(self, state: Any, carry: Any, key: jax.Array) -> tuple[Mapping[str, Any], Any]:
        """Returns the batches of the next steps, and the carry of the next call.

        Args:
            state: `state.model`, called like the model in a task, in evaluation mode; and
                `state.step`, an int32 scalar.
            carry: what the last call returned, such as the states of environments. It is saved in
                checkpoints.
            key: a random key, another one in each call.

        Returns:
            The fields of the batches, (num_batches, batch size, ...), and the next carry.
        """
        ...


def is_collector(source: Any) -> bool:
    """Whether a source makes its batches with the model."""
    return hasattr(source, 'collect')


@dataclasses.dataclass(frozen=True)
class _Block:
    arrays: dict[str, np.ndarray]
    ids: np.ndarray


class CollectLoader:
    """The loader of a collector: its batches are empty, because the step makes them."""

    examples = None
    steps_per_epoch = None

    def __init__(self, collector: Collector, batch_size: int):
        """Checks the collector.

        Args:
            collector: the source.
            batch_size: rows of a batch.

        Raises:
            UserError: if it lacks a part of `Collector`.
        """
        path = 'config.data.source'
        missing = [
            name
            for name in ('spec', 'num_batches', 'initial_carry')
            if not hasattr(collector, name)
        ]
        if missing:
            raise UserError(
                f'{path}: {type(collector).__name__} has `collect`, so it also needs '
                f'{", ".join(missing)}: see trainer.input.collected.Collector'
            )
        if not isinstance(collector.num_batches, int) or collector.num_batches < 1:
            raise UserError(
                f'{path}: num_batches of {type(collector).__name__} is '
                f'{collector.num_batches!r}; expected a positive number'
            )
        self.collector = collector
        self._batch_size = batch_size

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of the batches that the step makes."""
        return {
            name: jax.ShapeDtypeStruct((self._batch_size, *x.shape), x.dtype)
            for name, x in self.collector.spec.items()
        }

    def block(self, start: int, count: int, rows: Rows = ALL) -> _Block:
        """Returns empty batches: only the numbers of their rows, from the beginning of the run."""
        ids = np.arange(start * self._batch_size, (start + count) * self._batch_size)
        return _Block({}, ids.reshape(count, self._batch_size)[:, rows])


def check_batches(
    batches: Any, spec: Mapping[str, jax.ShapeDtypeStruct], collector: Collector
) -> None:
    """Checks, while the step is traced, what `collect` returns.

    Raises:
        UserError: if it is not what `spec` and `num_batches` say.
    """
    name, count = type(collector).__name__, collector.num_batches
    if not isinstance(batches, Mapping) or set(batches) != set(spec):
        found = sorted(batches) if isinstance(batches, Mapping) else describe(batches)
        raise UserError(
            f'config.data.source: {name}.collect returned the fields {found}; its spec has '
            f'{sorted(spec)}'
        )
    for field, expected in spec.items():
        shape, x = (count, *expected.shape), batches[field]
        if x.shape != shape or x.dtype != expected.dtype:
            raise UserError(
                f'config.data.source: {name}.collect returned {field!r} as {describe(x)}; expected '
                f'{np.dtype(expected.dtype)}{list(shape)}: num_batches, config.data.batch_size, '
                'and the shape of its spec'
            )
