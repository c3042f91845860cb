# SPDX-License-Identifier: Apache-2.0
"""Bound models: pytrees of a module, its variables, RNG keys and training flag."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import errors

from trainer import compat
from trainer.klinen import capture, intermediates
from trainer.klinen.binding import Binding
from trainer.klinen.definition import Definition
from trainer.klinen.interface import Interface
from trainer.modules import train_flags

M = TypeVar('M', bound=nn.Module)


class Bound:
    """Base of all bound classes, before the module's class in their MRO."""

    _bound: Binding

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection by its name, the parameters among them."""
        return self._bound.variables

    def unbind(self) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the module without variables, and its variables."""
        return self._bound.definition.module, self.variables

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        return _read(self._bound, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise errors.SetAttributeFrozenModuleError(type(self).__name__, name, value)

    def __dir__(self) -> list[str]:
        return sorted(
            {*object.__dir__(self), *intermediates.module_attributes(self._bound.bind_linen())}
        )

    def __repr__(self) -> str:
        return repr(self._bound.definition.with_training(self._bound.training))

    def __reduce__(self) -> Any:
        return make_bound, (self._bound,)


def _definition_method(name: str) -> Callable[..., Any]:
    def method(self: Bound, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._bound.definition.module, name)(*args, **kwargs)

    return functools.wraps(getattr(nn.Module, name))(method)


# Linen's own methods, which take variables or make them: they know nothing of these here.
_LINENS = ('apply', 'bind', 'clone', 'copy', 'init', 'init_with_output', 'lazy_init', 'tabulate')
for _name in _LINENS:
    setattr(Bound, _name, _definition_method(_name))


def make_bound(binding: Binding) -> Any:
    """Returns the bound model: an instance of a subclass of its module's class."""
    cls: Any = type(binding.definition.module)
    model = object.__new__(_bound_class(cls))
    vars(model)['_bound'] = binding
    return model


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
        return make_bound(dataclasses.replace(binding, **new))
    if isinstance(module, Interface):
        # The flag of the definition stays as the class has it: the mode is the binding's.
        default = train_flags.fields(module)['training']
        plain = module if module.training == default else module.clone(training=default)
        return make_bound(Binding(definition=Definition(plain), training=module.training, **new))
    return make_bound(Binding(definition=Definition(module), **new))


@functools.cache
def _bound_class(cls: Any) -> Any:
    """Makes the subclass whose methods run with variables, and registers it as a pytree."""
    # What a class has by these names stays for its own code: of a bound model they are methods.
    interface = {
        name: value
        for name, value in {**vars(Interface), **vars(Bound)}.items()
        if not name.startswith('_')
    }
    names = {f.name for f in dataclasses.fields(cls)} - {'parent', 'name', *interface}
    namespace: dict[str, Any] = {name: _field_property(name) for name in sorted(names)}
    for base in cls.__mro__:
        # Not the members of Linen's own classes, nor of `knn.Module`, whose base the interface is.
        if base in nn.Module.__mro__ or Interface in (base, *base.__bases__):
            continue
        for name, value in vars(base).items():
            if name not in namespace and name not in interface:
                member = _bound_member(name, value)
                if member is not None:
                    namespace[name] = member
    namespace.update(
        # `dataclasses.replace` makes a module without variables, as `clone` does.
        __new__=lambda _, *args, **kwargs: cls(*args, **kwargs),
        training=property(lambda self: self._bound.training),
        __doc__=cls.__doc__,
        __module__=cls.__module__,
        __qualname__=cls.__qualname__,
        __eq__=object.__eq__,
        __hash__=object.__hash__,
    )
    bases = (Bound, cls) if issubclass(cls, Interface) else (Bound, Interface, cls)
    made = type(cls.__name__, bases, namespace)
    # Not before: Linen would take them for methods of a module.
    for name, value in interface.items():
        setattr(made, name, value)
    jax.tree_util.register_pytree_with_keys(made, _flatten_with_keys, _unflatten, _flatten)
    return made


def _read(binding: Binding, name: str) -> Any:
    """Returns a field, a property or what `setup` has made; modules come bound."""
    if name in intermediates.fields(binding.definition.module):
        raise intermediates.unset_error(binding.definition.module, name)
    value = getattr(binding.bind_linen(), name)
    if not any(intermediates.modules_in(value)):
        return value
    unflagged = getattr(binding.bind_linen(with_training=False), name)
    return intermediates.map_modules(unflagged, lambda part: _bound_part(binding, part))


def _bound_part(binding: Binding, part: nn.Module) -> Any:
    """Returns a part as a bound model."""
    assert part.scope is not None
    # From `vars`: to ask the part itself would run its setup.
    key = part.scope.path, type(part), vars(part).get('training', True)
    if key not in binding.models:
        binding.models[key] = make_bound(binding.bind_part(part))
    return binding.models[key]


def _field_property(name: str) -> property:
    return property(lambda self: _read(self._bound, name))


def _bound_member(name: str, value: Any) -> Any:
    """Returns what stands in a bound class for a member of the module's class, if anything."""
    if name == 'setup' or (name.startswith('_') and name != '__call__'):
        return None
    if compat.is_nowrap(value) or isinstance(value, (staticmethod, classmethod, type)):
        return None
    if not inspect.isfunction(value):
        return _field_property(name) if hasattr(value, '__get__') else None
    getters = () if name == '__call__' else (operator.attrgetter(name),)

    @functools.wraps(value)
    def method(self: Bound, *args: Any, **kwargs: Any) -> Any:
        return capture.run(self._bound, getters, args, kwargs)[0]

    return nn.nowrap(method)


def _flatten(model: Any) -> tuple[tuple[Any, ...], Any]:
    binding = model._bound
    # As they are: tree functions also put what is no array, and no dict, in their place.
    children = (binding.params, binding.collections, binding.rng)
    return children, (binding.definition, binding.training)


def _flatten_with_keys(model: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, static = _flatten(model)
    names = ('params', 'collections', 'rng')
    keys = [jax.tree_util.GetAttrKey(name) for name in names]
    return list(zip(keys, children, strict=True)), static


def _unflatten(static: Any, children: Any) -> Any:
    (definition, training), (params, collections, rng) = static, children
    return make_bound(
        Binding(
            definition=definition,
            params=params,
            collections=collections,
            rng=rng,
            training=training,
        )
    )
