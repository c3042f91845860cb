# SPDX-License-Identifier: Apache-2.0
"""The interface of Klinen models: binding, random keys, training flag, intermediates."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Self

import flax.linen as nn
import jax
from flax import errors

from trainer.klinen import capture, intermediates, rngs, specs
from trainer.klinen.binding import Binding, pmap_axes
from trainer.klinen.intermediates import Intermediates
from trainer.modules import nnx_bridge, train_flags


class Interface:
    """The methods that every Klinen model has.

    They return copies or values; no method modifies the model.
    """

    def init_bind(self, rng: Any, *args: Any, method: str | None = None, **kwargs: Any) -> Self:
        """Returns a copy that is bound to fresh variables, created by one call of the module.

        Args:
            rng: a key or a seed, as Linen's `init` takes it, or a dict of these by stream name. A
                key may be an object that has one as `__jax_array__()` or `rng`.
            *args: positional arguments of the call: arrays, whose values do not matter, or
                `jax.ShapeDtypeStruct`s and other objects with a shape and a dtype, such as the
                specs of etils.
            method: the name of the method to call instead of `__call__`.
            **kwargs: keyword arguments of the call.
        """
        empty, keys = _binding(self.with_variables({})), rngs.as_rng(rng)
        if not isinstance(keys, dict):
            # 'params' gets the key itself: the parameters are those of Linen's `init(rng)`.
            keys = {**rngs.stream_keys(keys, empty.definition.streams), 'params': keys}
        module = empty.definition.with_training(empty.training)
        call = train_flags.method_with_training(_method_getters(method), empty.training)
        args, kwargs = jax.tree.map(specs.as_spec, (args, kwargs))
        leaves = jax.tree.leaves((args, kwargs))
        # `init` computes with its inputs; `lazy_init` also takes shapes.
        lazy = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        init = module.lazy_init if lazy else module.init
        # Both collections hold values of one call, which are not part of a model.
        mutable = nn.DenyList((intermediates.COLLECTION, 'perturbations'))
        with pmap_axes.intercept_calls(), nnx_bridge.pass_training_to_nnx(empty.training):
            variables = init(keys, *args, method=call, mutable=mutable, **kwargs)
        return self.with_variables(variables)

    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """Returns a copy that is bound to existing variables, such as those of a checkpoint.

        Args:
            variables: collections by name ('params', 'batch_stats', ...), as for Linen's `apply`.
        """
        collections = dict(variables)
        return _replace_binding(self, params=collections.pop('params', {}), collections=collections)

    def with_params(self, params: Any) -> Self:
        """Returns a copy with other parameters, such as those that an optimizer has updated."""
        return _replace_binding(self, params=params)

    def with_rng(self, rng: Any = None) -> Self:
        """Returns a copy with other random keys.

        Args:
            rng: a key or a seed, which is folded with the name of each RNG stream; a dict of keys
                by stream name ('dropout', ...); or None, to advance the current keys.

        Raises:
            ValueError: if `rng` is None and the model has no keys.
        """
        current = _binding(self).rng
        if rng is not None:
            return _replace_binding(self, rng=rngs.as_rng(rng))
        if current is None:
            raise ValueError(
                'with_rng() advances the current key, and the model has none; call with_rng(rng) '
                'first'
            )
        return _replace_binding(self, rng=rngs.next_rng(current))

    def train(self) -> Self:
        """Returns a copy in training mode, the default."""
        return _with_training(self, True)

    def eval(self) -> Self:
        """Returns a copy in evaluation mode."""
        return _with_training(self, False)

    @property
    def params(self) -> Any:
        """The nested dict of parameters."""
        return _binding(self).params

    @property
    def rngs(self) -> dict[str, jax.Array]:
        """The keys by RNG stream, from `with_rng`; a submodule folds them with its path."""
        return dict(rngs.stream_keys(_binding(self).rng, _binding(self).definition.streams))

    @property
    def variables(self) -> Any:
        """Every variable collection by its name, including the parameters."""
        # `Bound` overrides this property: here the module is bound by Linen or not at all.
        if vars(self).get('scope') is None:
            raise unbound_error(self)
        return nn.Module.variables.__get__(self)

    def call_with_updates(
        self, *args: Any, method: str | None = None, **kwargs: Any
    ) -> tuple[Any, Self]:
        """Returns the output and a copy with the variables after the call (batch statistics).

        Args:
            *args: positional arguments of the call.
            method: the name of the method to call instead of `__call__`.
            **kwargs: keyword arguments of the call.

        Raises:
            ValueError: if the call changes the structure of a collection: sown values must not
                accumulate in the model.
        """
        binding = _binding(self)
        names = sorted(binding.collections)
        output, changed = capture.run(binding, _method_getters(method), args, kwargs, mutable=names)
        for name, value in changed.items():
            before: Any = jax.tree.structure(binding.collections[name])
            if before != jax.tree.structure(value):
                raise ValueError(
                    f'the call changed the structure of collection {name!r}; sown values that '
                    'accumulate cannot be part of a model: use a field knn.Intermediate[...]'
                )
        return output, _replace_binding(self, collections={**binding.collections, **changed})

    @contextlib.contextmanager
    def capture_intermediates(self) -> Iterator[Intermediates]:
        """Yields the intermediates of the last call of this model within the `with`.

        They have the structure of this model. Calls of copies (`model.eval()`) and of submodules
        (`model.encoder`) count too, and for a submodule those of the model that contains it. Under
        `jax.jit` the call must be in the same compiled function.

        Raises:
            RuntimeError: within another `capture_intermediates`.
        """
        active = capture.Capture(_binding(self))
        if capture.current.get() is not None:
            raise RuntimeError('capture_intermediates: another capture is active; do not nest them')
        token = capture.current.set(active)
        try:
            yield active.result
        finally:
            capture.current.reset(token)

    def call_with_intermediates(
        self, *args: Any, method: str | None = None, **kwargs: Any
    ) -> tuple[Any, Intermediates]:
        """Returns the output and the values of fields `knn.Intermediate[...]` in the call.

        Args:
            *args: positional arguments of the call.
            method: the name of the method to call instead of `__call__`.
            **kwargs: keyword arguments of the call.
        """
        with self.capture_intermediates() as values:
            output, _ = capture.run(_binding(self), _method_getters(method), args, kwargs)
        return output, values

    # An alias, for code that uses the singular.
    call_with_intermediate = call_with_intermediates


def _binding(model: Any) -> Binding:
    binding = vars(model).get('_bound')
    if binding is None:
        raise unbound_error(model)
    return binding


class UnboundError(errors.CallCompactUnboundModuleError, ValueError):
    """A model without variables is called, or its parameters are read."""

    def __init__(self, message: str):
        """Sets the message; the constructor of Linen's error takes none."""
        Exception.__init__(self, message)


def unbound_error(model: Any) -> UnboundError:
    """Returns the error for a model that has no variables yet."""
    return UnboundError(
        f'{type(model).__name__} is not bound to parameters: call model = '
        'model.init_bind(rng, *args) or model.with_variables(variables) before calling it or '
        'reading its parameters'
    )


def _method_getters(method: str | None) -> tuple[Any, ...]:
    return () if method is None else (operator.attrgetter(method),)


def _with_training(model: Any, training: bool) -> Any:
    if '_bound' not in vars(model):
        return model.clone(training=training)
    return _replace_binding(model, training=training)


def _replace_binding(model: Any, **changes: Any) -> Any:
    """Returns a copy of a bound model with other variables, keys or training flag."""
    # `dataclasses.replace` also empties the cache of submodules, which have the old variables.
    binding = dataclasses.replace(_binding(model), **changes)
    copied = object.__new__(type(model))
    vars(copied)['_bound'] = binding
    return copied
