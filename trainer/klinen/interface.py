# SPDX-License-Identifier: Apache-2.0
"""What a Klinen model can do besides its own methods."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar

import flax.linen as nn
import jax
from flax import errors

from trainer.klinen import intermediates, rngs, specs
from trainer.klinen.bound import Binding, bound, pmap_axes
from trainer.klinen.definition import Definition
from trainer.klinen.intermediates import Intermediates
from trainer.modules import train_flags

M = TypeVar('M', bound=nn.Module)


class Interface:
    """What a model can do besides its own methods.

    Everything returns a copy or a value; no method changes the model.
    """

    def init_bind(self, rng: Any, *args: Any, method: str | None = None, **kwargs: Any) -> Self:
        """Returns a copy that is bound to fresh variables, made by one call of the module.

        Args:
            rng: a key or a seed, as Linen's `init` takes it, or a dict of these by stream. A key
                may be an object that has one as `__jax_array__()` or `rng`.
            *args: of the call: arrays, whose values do not matter, or `jax.ShapeDtypeStruct`s and
                other objects with a shape and a dtype, such as the specs of etils.
            method: the name of the method to call instead of `__call__`.
            **kwargs: of the call.
        """
        made, keys = self.with_variables({})._bound, rngs.as_rng(rng)  # type: ignore[attr-defined]
        if not isinstance(keys, dict):
            keys = {**rngs.known(keys, made.definition.streams), 'params': keys}
        module = made.definition.told(made.training)
        call = train_flags.method(_steps(method), made.training)
        args, kwargs = jax.tree.map(specs.as_spec, (args, kwargs))
        leaves = jax.tree.leaves((args, kwargs))
        lazy = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        init = module.lazy_init if lazy else module.init
        mutable = nn.DenyList((intermediates.COLLECTION, 'perturbations'))
        with pmap_axes.calling():
            variables = init(keys, *args, method=call, mutable=mutable, **kwargs)
        return self.with_variables(variables)

    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """Returns a copy that is bound to variables from elsewhere, such as a checkpoint.

        Args:
            variables: collections by name ('params', 'batch_stats', ...), as Linen's `apply` takes
                them.
        """
        return bind(self, variables)  # type: ignore[type-var]

    def with_params(self, params: Any) -> Self:
        """Returns a copy with other parameters, such as those that an optimizer has updated."""
        return bound(dataclasses.replace(_binding(self), params=params))

    def with_rng(self, rng: Any = None) -> Self:
        """Returns a copy with other random keys.

        Args:
            rng: a key or a seed: each stream draws from it, folded with the stream's name; a dict
                of keys by stream ('dropout', ...); or None: the key after the current one.

        Raises:
            ValueError: if there is no current key to follow.
        """
        binding = _binding(self)
        if rng is None and binding.rng is None:
            raise ValueError('with_rng(): there is no key to go on from; first call with_rng(rng)')
        new = rngs.following(binding.rng) if rng is None else rngs.as_rng(rng)  # type: ignore[arg-type]
        return bound(dataclasses.replace(binding, rng=new))

    def train(self) -> Self:
        """Returns a copy in training mode, the default."""
        return _in_mode(self, True)

    def eval(self) -> Self:
        """Returns a copy in evaluation mode."""
        return _in_mode(self, False)

    @property
    def params(self) -> Any:
        """The nested dict of parameters."""
        return _binding(self).params

    @property
    def rngs(self) -> dict[str, jax.Array]:
        """The keys by stream that `with_rng` has given; a part folds them with its path."""
        return dict(rngs.known(_binding(self).rng, _binding(self).definition.streams))

    @property
    def variables(self) -> Any:
        """Every variable collection by its name, the parameters among them."""
        if vars(self).get('scope') is None:
            raise unbound(self)
        return super().variables  # type: ignore[misc]

    def call_with_updates(
        self, *args: Any, method: str | None = None, **kwargs: Any
    ) -> tuple[Any, Self]:
        """Returns the output and a copy with what the call has changed, as batch statistics.

        Args:
            *args: of the call.
            method: the name of the method to call instead of `__call__`.
            **kwargs: of the call.

        Raises:
            ValueError: if a collection has another structure after the call: values that are sown
                must not pile up in the model.
        """
        binding = _binding(self)
        names = sorted(binding.collections)
        output, changed = binding.run(_steps(method), args, kwargs, mutable=names)
        for name, value in changed.items():
            before: Any = jax.tree.structure(binding.collections[name])
            if before != jax.tree.structure(value):
                raise ValueError(
                    f'the call changed the structure of the collection {name!r}; values that pile '
                    'up (sow) are no part of a model: keep them in a field knn.Intermediate[...]'
                )
        collections = {**binding.collections, **changed}
        return output, bound(dataclasses.replace(binding, collections=collections))

    @contextlib.contextmanager
    def capture_intermediates(self) -> Iterator[Intermediates]:
        """Yields what the calls of this model keep inside of the `with`; the last call counts.

        It has the structure of this model. Calls of copies (`model.eval()`) and of parts
        (`model.encoder`) count too, and of a part those of the model that it is in. Under `jax.jit`
        the call must be in the same compiled function.

        Raises:
            RuntimeError: inside of another `capture_intermediates`.
        """
        capture = intermediates.Capture(_binding(self))
        if intermediates.current.get() is not None:
            raise RuntimeError('capture_intermediates: another one is open; they do not nest')
        token = intermediates.current.set(capture)
        try:
            yield capture.result
        finally:
            intermediates.current.reset(token)

    def call_with_intermediates(
        self, *args: Any, method: str | None = None, **kwargs: Any
    ) -> tuple[Any, Intermediates]:
        """Returns the output and what the call has kept in fields `knn.Intermediate[...]`.

        Args:
            *args: of the call.
            method: the name of the method to call instead of `__call__`.
            **kwargs: of the call.
        """
        with self.capture_intermediates() as found:
            output, _ = _binding(self).run(_steps(method), args, kwargs)
        return output, found

    call_with_intermediate = call_with_intermediates


def bind(module: M, variables: Mapping[str, Any]) -> M:
    """Returns the module, of Klinen or plain Linen, as a Klinen model that holds these variables.

    Args:
        module: a module; if it is bound already, it keeps its mode and its random keys.
        variables: collections by name ('params', 'batch_stats', ...).
    """
    collections = dict(variables)
    new = {'params': collections.pop('params', {}), 'collections': collections}
    binding = vars(module).get('_bound')
    if binding is not None:
        return bound(dataclasses.replace(binding, **new))
    if isinstance(module, Interface):
        # The flag of the definition stays as the class has it: the mode is the binding's.
        default = train_flags.fields(module)['training']
        plain = module if module.training == default else module.clone(training=default)
        return bound(Binding(definition=Definition(plain), training=module.training, **new))
    return bound(Binding(definition=Definition(module), **new))


def _binding(model: Any) -> Binding:
    binding = vars(model).get('_bound')
    if binding is None:
        raise unbound(model)
    return binding


class UnboundError(errors.CallCompactUnboundModuleError, ValueError):
    """A model is called, or read, that has no variables yet."""

    def __init__(self, message: str):
        """Has a message of its own, unlike the error of Linen."""
        Exception.__init__(self, message)


def unbound(model: Any) -> UnboundError:
    """Returns the error of a model that has no variables yet."""
    return UnboundError(
        f'{type(model).__name__} is not bound to parameters: first call model = '
        'model.init_bind(rng, *args), or model.with_variables(variables), before calling it or '
        'reading its parameters'
    )


def _steps(method: str | None) -> tuple[Any, ...]:
    return () if method is None else (operator.attrgetter(method),)


def _in_mode(model: Any, training: bool) -> Any:
    binding = vars(model).get('_bound')
    if binding is None:
        return model.clone(training=training)
    return bound(dataclasses.replace(binding, training=training))
