# SPDX-License-Identifier: Apache-2.0
"""The functional interface of models, which the train step uses for all module systems."""

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
    """A model whose variables are arguments and results of its methods."""

    @property
    def precision(self) -> Precision:
        """The dtypes of its parameters, its computation and its output."""

    def init(
        self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys
    ) -> Mapping[str, Any]:
        """Returns fresh variables, including 'params', of all modules that a task calls."""

    def bind(self, variables: Mapping[str, Any], keys: Keys, *, ema: Any = None) -> BoundModel:
        """Returns the bound model that a task calls."""


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
        """Returns the bound model that a task calls."""
        bound = self.model.bind(variables, keys, ema=ema)
        bound.attach(self.recorder)
        return bound


def as_functional(
    module: object, precision: Precision = AS_IS, *, named: bool = False
) -> Functional:
    """Wraps a user's module for the step functions.

    Args:
        module: a Linen module, an NNX module, or a function `make(rngs)` that returns the latter.
        precision: the dtypes of its parameters, its computation and its output.
        named: whether operations of an NNX module carry the names of its submodules in traces, as
            those of a Linen module always do.

    Raises:
        TypeError: if `module` is not of a supported module system and does not create a module.
        UserError: if an adapter refuses it: see `adapters`.
    """
    from flax import linen as nn

    for adapter in adapters.registered:
        if (reason := adapter.refusal(module)) is not None:
            raise UserError(f'config.model: {reason}')
    if isinstance(module, nn.Module):
        return Linen(module, precision)
    # Not imported, which is slow: an NNX module exists only if NNX was imported.
    nnx = sys.modules.get('flax.nnx')
    if nnx is not None and isinstance(module, nnx.Module):
        if jax.tree.leaves(nnx.state(module, nnx.Param)):
            _log.warning(
                'config.model: %s was created without the `rngs` of the run: its initial '
                'parameters do not depend on config.seed, and are the same for all members of an '
                'ensemble',
                type(module).__name__,
            )
        # A copy for each use, because NNX modules are mutable.
        module = functools.partial(_clone, module)
    if (reason := foreign.refusal(module)) is not None:
        raise TypeError(reason)
    from trainer.modules.nnx import NNX

    return NNX(cast(Callable[..., Any], module), precision, named)


def _clone(module: Any, rngs: Any) -> Any:
    from flax import nnx

    return nnx.clone(module)
