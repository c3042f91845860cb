# SPDX-License-Identifier: Apache-2.0
"""Several sets of variables of one module, called as one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean
from trainer.modules.functional import Functional
from trainer.modules.model_view import BoundModel, Calls, Getters
from trainer.modules.rng import Keys
from trainer.modules.static_leaves import WithStaticLeaves

Combine = Callable[[Any], Any]


class EnsembleModel(BoundModel):
    """A model each of whose variables has a dimension for the members before all others.

    A call is a call of every member; what they return is combined, and `model.intermediates` are
    the means of the floats that they sow; what has no mean is there once for each member.
    `model.params` and `model.variables` are those of all members.
    """

    def __init__(
        self,
        functional: Functional,
        variables: Mapping[str, Any],
        keys: Keys,
        seeds: jax.Array,
        *,
        ema: Any = None,
        combine: Combine,
        axis: str | None = None,
        counted: Sequence[int] = (),
    ):
        """Binds; nothing runs before a call.

        Args:
            functional: the module.
            variables: of all members.
            keys: their random keys, but for the seed.
            seeds: int32 (members,).
            ema: the members' moving averages, or None.
            combine: makes one output of those of the module's own call, stacked over the members;
                outputs of its methods and parts are averaged.
            axis: mesh axis that the members are spread over, or None.
            counted: indices of the members whose outputs are combined; empty for all.
        """
        collections = {name: value for name, value in variables.items() if name != 'params'}
        super().__init__(variables['params'], Calls(collections), keys, ema)
        self._functional = functional
        self._seeds = seeds
        self._combine = combine
        self._axis = axis
        self._counted = np.array(counted or range(len(seeds)))

    def _field(self, name: str) -> Any:
        first = jax.tree.map(lambda x: x[0], self.variables)
        field = self._functional.bind(first, self._keys)._field(name)
        if isinstance(field, jax.Array):
            raise UserError(
                f'model.{name}: each member of an ensemble has its own; `model.variables` has them '
                'all, with the members before all other dimensions'
            )
        return field

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        def call(variables: Any, seed: jax.Array) -> Any:
            model = self._functional.bind(variables, dataclasses.replace(self._keys, seed=seed))
            model._calls.count = self._calls.count
            output = model._apply(getters, args, kwargs)
            return output, model.collections, WithStaticLeaves.from_value(model.intermediates)

        made = jax.vmap(call, spmd_axis_name=self._axis)(self.variables, self._seeds)
        outputs, self._calls.collections, sown = made
        if len(self._counted) < len(self._seeds):
            outputs, sown = jax.tree.map(lambda x: x[self._counted], (outputs, sown))
        self._calls.intermediates = jax.tree.map(_mean_of_floats, sown).value
        self._calls.count += 1
        if not getters:
            return self._combine(outputs)
        return mean(outputs, whose='a method or a part of the model')


def _mean_of_floats(x: jax.Array) -> jax.Array:
    return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x
