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
    """Base of all bound classes; precedes the module's class in their MRO."""

    _bound: Binding

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection by its name, including the parameters."""
        return self._bound.variables

    def unbind(self) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the module without variables, and its variables."""
        return self._bound.definition.module, self.variables

    def __getattr__(self, name: str) -> Any:
        # Without this, reading `_bound` before it is set would recurse.
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


# Linen's methods that take or create variables. They run on the unbound module, because they must
# not use the variables that the model is bound to.
_LINEN_METHODS = (
    'apply',
    'bind',
    'clone',
    'copy',
    'init',
    'init_with_output',
    'lazy_init',
    'tabulate',
)
for _name in _LINEN_METHODS:
    setattr(Bound, _name, _definition_method(_name))


def make_bound(binding: Binding) -> Any:
    """Returns the bound model: an instance of a subclass of its module's class."""
    cls: Any = type(binding.definition.module)
    # Calling the class would create an unbound module, and its `__setattr__` raises.
    model = object.__new__(_bound_class(cls))
    vars(model)['_bound'] = binding
    return model


def bind(module: M, variables: Mapping[str, Any]) -> M:
    """Returns a Klinen or Linen module as a Klinen model that holds these variables.

    Args:
        module: a module; one that is bound already keeps its training flag and its random keys.
        variables: collections by name ('params', 'batch_stats', ...).
    """
    collections = dict(variables)
    new = {'params': collections.pop('params', {}), 'collections': collections}
    binding = vars(module).get('_bound')
    if binding is not None:
        return make_bound(dataclasses.replace(binding, **new))
    if isinstance(module, Interface):
        # `Definition.with_training` only sets flags that have their defaults, so the definition
        # gets the default and the binding the actual flag.
        default = train_flags.fields(module)['training']
        plain = module if module.training == default else module.clone(training=default)
        return make_bound(Binding(definition=Definition(plain), training=module.training, **new))
    return make_bound(Binding(definition=Definition(module), **new))


@functools.cache
def _bound_class(cls: Any) -> Any:
    """Creates the subclass whose methods run with variables, and registers it as a pytree.

    Cached, because bound models of one class must have one type: their pytree node type.
    """
    # These names are the interface of a bound model even if the module's class defines them too;
    # the code of the module still sees its own, because it runs on the unbound class.
    interface = {
        name: value
        for name, value in {**vars(Interface), **vars(Bound)}.items()
        if not name.startswith('_')
    }
    names = {f.name for f in dataclasses.fields(cls)} - {'parent', 'name', *interface}
    namespace: dict[str, Any] = {name: _field_property(name) for name in sorted(names)}
    for base in cls.__mro__:
        # Skip Linen's base classes, `Interface` and `knn.Module`: only members of the user's
        # classes are replaced.
        if base in nn.Module.__mro__ or Interface in (base, *base.__bases__):
            continue
        for name, value in vars(base).items():
            if name not in namespace and name not in interface:
                member = _bound_member(name, value)
                if member is not None:
                    namespace[name] = member
    namespace.update(
        # `dataclasses.replace` calls the class: it creates an unbound module, as `clone` does.
        __new__=lambda _, *args, **kwargs: cls(*args, **kwargs),
        training=property(lambda self: self._bound.training),
        __doc__=cls.__doc__,
        __module__=cls.__module__,
        __qualname__=cls.__qualname__,
        # By identity: those of a dataclass compare the fields and ignore the variables.
        __eq__=object.__eq__,
        __hash__=object.__hash__,
    )
    bases = (Bound, cls) if issubclass(cls, Interface) else (Bound, Interface, cls)
    bound = type(cls.__name__, bases, namespace)
    # After the class is created: Linen wraps the methods in its namespace as module methods.
    for name, value in interface.items():
        setattr(bound, name, value)
    jax.tree_util.register_pytree_with_keys(bound, _flatten_with_keys, _unflatten, _flatten)
    return bound


def _read(binding: Binding, name: str) -> Any:
    """Returns a field, a property or an attribute set by `setup`; modules in it are bound."""
    if name in intermediates.fields(binding.definition.module):
        raise intermediates.unset_error(binding.definition.module, name)
    value = getattr(binding.bind_linen(), name)
    if not any(intermediates.modules_in(value)):
        return value
    # The definition of a submodule keeps its flags as constructed, so that explicit ones can still
    # be distinguished from defaults.
    unflagged = getattr(binding.bind_linen(with_training=False), name)
    return intermediates.map_modules(unflagged, lambda part: _bound_part(binding, part))


def _bound_part(binding: Binding, part: nn.Module) -> Any:
    """Returns a submodule as a bound model."""
    assert part.scope is not None
    # `vars`, because reading an attribute of the submodule would run its setup.
    key = part.scope.path, type(part), vars(part).get('training', True)
    if key not in binding.models:
        binding.models[key] = make_bound(binding.bind_part(part))
    return binding.models[key]


def _field_property(name: str) -> property:
    return property(lambda self: _read(self._bound, name))


def _bound_member(name: str, value: Any) -> Any:
    """Returns the bound class's replacement for a member of the module's class, None for none."""
    # `setup` and private, nowrap or static members are inherited unchanged.
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
    # Unchanged, because tree functions also put other objects than arrays and dicts there.
    children = (binding.params, binding.collections, binding.rng)
    return children, (binding.definition, binding.training)


def _flatten_with_keys(model: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, static = _flatten(model)
    names = ('params', 'collections', 'rng')
    keys = [jax.tree_util.GetAttrKey(name) for name in names]
    return list(zip(keys, children, strict=True)), static


def _unflatten(static: Any, children: Any) -> Any:
    # No checks and no conversions: the children may be specs, axes of `vmap` or plain objects.
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
