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
    """A model whose variables have a leading dimension for the members.

    A call runs every member and combines their outputs. `model.intermediates` has the means of sown
    floats, and all members' values of other dtypes. `model.params` and `model.variables` are those
    of all members.
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
            functional: the model of one member.
            variables: the variables of all members.
            keys: the random keys of the members, apart from the seed.
            seeds: int32 (members,).
            ema: the members' moving averages, or None.
            combine: combines the outputs of the module's `__call__`, stacked over the members, into
                one; outputs of its methods and submodules are averaged.
            axis: mesh axis that the members are sharded over, or None.
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
                f'model.{name} differs between the members of an ensemble; `model.variables` has '
                'all of them, with a leading dimension for the members'
            )
        return field

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        def call(variables: Any, seed: jax.Array) -> Any:
            model = self._functional.bind(variables, dataclasses.replace(self._keys, seed=seed))
            # Later calls draw other random numbers, as they do for a single model.
            model._calls.count = self._calls.count
            output = model._apply(getters, args, kwargs)
            # `vmap` returns only arrays, and a module may sow anything.
            return output, model.collections, WithStaticLeaves.from_value(model.intermediates)

        # `spmd_axis_name` makes sharding constraints within the module keep the members' axis.
        stacked = jax.vmap(call, spmd_axis_name=self._axis)(self.variables, self._seeds)
        outputs, self._calls.collections, sown = stacked
        if len(self._counted) < len(self._seeds):
            outputs, sown = jax.tree.map(lambda x: x[self._counted], (outputs, sown))
        self._calls.intermediates = jax.tree.map(_mean_of_floats, sown).value
        self._calls.count += 1
        if not getters:
            return self._combine(outputs)
        return mean(outputs, whose='a method or a part of the model')


def _mean_of_floats(x: jax.Array) -> jax.Array:
    return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x
