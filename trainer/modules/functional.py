# SPDX-License-Identifier: Apache-2.0
"""A functional interface over module systems, as the step uses it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax

from trainer.config.errors import UserError
from trainer.modules import adapters, foreign
from trainer.modules.linen import Linen
from trainer.modules.model_view import BoundModel
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.recorder import ModuleRecorder
from trainer.modules.rng import Keys

_log = logging.getLogger('trainer')


class Functional(Protocol):
    """A model as functions of its variables."""

    @property
    def precision(self) -> Precision:
        """The dtypes of its parameters, its computation and its output."""

    def init(
        self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys
    ) -> Mapping[str, Any]:
        """Returns fresh variables, 'params' among them, for all modules that a task calls."""

    def bind(self, variables: Mapping[str, Any], keys: Keys, *, ema: Any = None) -> BoundModel:
        """Returns the callable that a task gets."""


@dataclasses.dataclass(frozen=True)
class RecordedModel:
    """A functional model whose calls are recorded.

    Attributes:
        model: the functional model.
        recorder: records the calls.
    """

    model: Functional
    recorder: ModuleRecorder

    def bind(self, variables: Mapping[str, Any], keys: Keys, *, ema: Any = None) -> BoundModel:
        """Returns the callable that a task gets."""
        bound = self.model.bind(variables, keys, ema=ema)
        bound.attach(self.recorder)
        return bound


def as_functional(
    module: object, precision: Precision = AS_IS, *, named: bool = False
) -> Functional:
    """Wraps a user's module for the step functions.

    Args:
        module: a Linen module, an NNX module, or a function `make(rngs)` that returns one of these.
        precision: the dtypes of its parameters, its computation and its output.
        named: whether what an NNX module computes carries the names of its parts in traces; with
            Linen it always does.

    Raises:
        TypeError: if `module` is of no module system that is supported, or makes no module.
        UserError: if it is of a kind that is no config's model: see `adapters`.
    """
    from flax import linen as nn

    for adapter in adapters.registered:
        if (reason := adapter.refusal(module)) is not None:
            raise UserError(f'config.model: {reason}')
    if isinstance(module, nn.Module):
        return Linen(module, precision)
    nnx = sys.modules.get('flax.nnx')  # Whoever has made an NNX module has imported it.
    if nnx is not None and isinstance(module, nnx.Module):
        if jax.tree.leaves(nnx.state(module, nnx.Param)):
            _log.warning(
                'config.model: %s was made without the `rngs` that a run gives: config.seed does '
                'not change the parameters that it begins with, and those of all members of an '
                'ensemble are the same',
                type(module).__name__,
            )
        module = functools.partial(_clone, module)
    if (reason := foreign.refusal(module)) is not None:
        raise TypeError(reason)
    from trainer.modules.nnx import NNX

    return NNX(cast(Callable[..., Any], module), precision, named)


def _clone(module: Any, rngs: Any) -> Any:
    from flax import nnx

    return nnx.clone(module)
