# SPDX-License-Identifier: Apache-2.0
"""The contents of a bound model (module, variables, RNG keys, training flag), and its calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors, traverse_util
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from trainer import compat
from trainer.klinen import intermediates, rngs
from trainer.klinen.definition import Definition
from trainer.modules import nnx_bridge, train_flags
from trainer.modules.pmap_axes import PmapAxes

# Shared by all models, so that each axis is warned about once.
pmap_axes = PmapAxes()

# Collections that exist to have gradients: what `perturb` adds, and the scales of fp8 layers. All
# others (statistics, caches, counts) get zero gradients, so that an optimizer update of the whole
# pytree changes nothing that only a call may change.
_DIFFERENTIATED = frozenset({'perturbations', OVERWRITE_WITH_GRADIENT})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Binding:
    """The values that a model is bound to.

    Attributes:
        definition: static description of the module, without arrays.
        params: parameters of the module, a nested dict of arrays.
        collections: its other variables, by collection name.
        rng: a key for all RNG streams, keys by stream name, or None.
        training: whether dropout drops and batch norm updates.
        models: the bound submodules that were read so far: a submodule that is used in several
            places is one object.
    """

    definition: Definition
    params: Any
    collections: Mapping[str, Any]
    rng: rngs.Rng | None = None
    training: bool = True
    models: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Bound submodules are a cache: they are created again when they are read.
        return {**vars(self), 'models': {}}

    @property
    def variables(self) -> dict[str, Any]:
        """Every collection, including the parameters."""
        return {'params': self.params, **self.collections}

    def apply(
        self, getters: tuple[Any, ...], args: Any, kwargs: Any, mutable: Iterable[str]
    ) -> tuple[Any, dict[str, Any]]:
        """Calls a method and returns its output and the mutable collections.

        Args:
            getters: functions that lead from the module to the method; empty for `__call__`.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            mutable: names of the collections that the call may change.
        """
        collections = {
            name: value if name in _DIFFERENTIATED else jax.lax.stop_gradient(value)
            for name, value in self.collections.items()
        }
        module = self.definition.with_training(self.training)

        def call(keys: rngs.Keys) -> Any:
            return module.apply(
                {'params': self.params, **collections},
                rngs=rngs.fold_path(keys, self.definition.path),
                mutable=sorted(mutable),
                # The lambda closes over the arguments, because `apply` would take keywords such as
                # `rngs` and `mutable` for its own.
                method=lambda m: train_flags.method_with_training(getters, self.training)(
                    m, *args, **kwargs
                ),
            )

        try:
            with pmap_axes.intercept_calls(), nnx_bridge.pass_training_to_nnx(self.training):
                output, changed = rngs.run(call, self.rng, self.definition.streams)
        except errors.ModifyScopeVariableError as error:
            error.add_note(
                'Calling a Klinen model does not modify it. Use y, model = '
                'model.call_with_updates(x) to get the updated model, or model.eval()(x).'
            )
            raise
        except errors.ScopeCollectionNotFound as error:
            if self.params or compat.missing_collection(error) != 'params':
                raise
            raise ValueError(
                f'{type(module).__name__} is bound to variables without parameters (collections: '
                f'{", ".join(self.collections) or "none"}); with_variables takes the collections '
                "by name: model.with_variables({'params': params, ...})"
            ) from error
        return output, dict(changed)

    def bind_linen(self, *, with_training: bool = True) -> Any:
        """Returns the module as `nn.Module.bind` binds it.

        Args:
            with_training: whether to set its training flags, or to leave them as constructed.
        """
        definition = self.definition
        module = definition.with_training(self.training) if with_training else definition.module
        keys = rngs.fold_path(rngs.stream_keys(self.rng, definition.streams), definition.path)
        return nn.Module.bind(module, self.variables, rngs=keys)

    def bind_part(self, part: nn.Module) -> Binding:
        """Returns the binding of a submodule.

        Args:
            part: the submodule, as Linen binds it within the module.
        """
        assert part.scope is not None
        module, variables = part.unbind()
        variables = _with_shared_variables(part, module, variables)
        return dataclasses.replace(
            self,
            definition=Definition(
                module,
                path=self.definition.path + part.scope.path,
                streams=self.definition.streams,
            ),
            params=variables.pop('params', {}),
            collections=variables,
            # A submodule that was constructed in evaluation mode stays in it.
            training=self.training and getattr(part, 'training', True) is not False,
        )


def _with_shared_variables(part: nn.Module, unbound: nn.Module, variables: Any) -> dict[str, Any]:
    """Adds the variables of modules that a submodule shares with the rest of the model.

    Linen keeps the variables of a shared module under the path of the module that owns it, so those
    below the submodule's own path may not be all that it needs.

    Args:
        part: the submodule, as Linen binds it within the model.
        unbound: the same submodule, without a scope.
        variables: the variables below the path of the submodule.
    """
    assert part.scope is not None
    path = part.scope.path
    flat = traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)

    def visit(within: nn.Module, single: nn.Module) -> None:
        for name in train_flags.fields(within):
            pairs = zip(
                intermediates.modules_in(getattr(within, name)),
                intermediates.modules_in(getattr(single, name)),
                strict=True,
            )
            for a, b in pairs:
                # Outside of the submodule's path: copied to where `unbound` will look for it.
                if a.scope.path[: len(path)] != path:
                    for key, value in traverse_util.flatten_dict(a.variables).items():
                        flat.setdefault((key[0], *b.scope.path, *key[1:]), value)
                visit(a, b)

    visit(part, nn.Module.bind(unbound, {}))
    return traverse_util.unflatten_dict(flat)
