# SPDX-License-Identifier: Apache-2.0
"""`knn.Module`: a Linen module that can be bound to its variables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

import flax.linen as nn
from flax import errors

from trainer import compat
from trainer.klinen import intermediates
from trainer.klinen.bound import Bound, bind
from trainer.klinen.interface import Interface, unbound_error
from trainer.modules import train_flags

M = TypeVar('M', bound=nn.Module)


class _NotYetError(ValueError, AttributeError):
    """An attribute that exists only after `init_bind`; `hasattr` needs the second base."""


class Module(Interface, nn.Module):
    """A Linen module with a training flag, which `init_bind` binds to its variables.

    Attributes:
        training: whether the model trains; its submodules follow it.
    """

    if TYPE_CHECKING:
        # A field with a default would make a type checker require defaults in all subclasses.
        @property
        def training(self) -> bool:
            """Whether the model trains."""

    else:
        training: bool = dataclasses.field(default=True, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A bound class has replacements for the methods that are wrapped here.
        if issubclass(cls, Bound):
            return
        _check_names(cls)
        _wrap_methods(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in train_flags.fields(self):
            if any(isinstance(part, Bound) for part in intermediates.modules_in(vars(self)[name])):
                raise ValueError(
                    f'{type(self).__name__}.{name} is bound to variables, which a new model would '
                    'lose: pass part.clone(), and pass the variables to model.with_variables(...)'
                )
        self._inherit_evaluation()

    @nn.nowrap
    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """Returns a bound copy: see `Interface`, whose method is for models that are bound."""
        return bind(self, variables)

    @nn.nowrap
    def _inherit_evaluation(self) -> None:
        """Takes over evaluation mode from the enclosing module, for itself and its submodules."""
        if self.training and not _surrounding_training(self):
            # Past the check of `__setattr__` below, which freezes the flag for users.
            object.__setattr__(self, 'training', False)
            # Submodules that were passed as fields were constructed before this module.
            for name in train_flags.fields(self):
                for part in intermediates.modules_in(getattr(self, name)):
                    if isinstance(part, Module):
                        part._inherit_evaluation()

    @nn.nowrap
    def __setattr__(self, name: str, value: Any) -> None:
        if name in intermediates.fields(self):
            # Past Linen, which freezes modules outside of `setup`.
            object.__setattr__(self, name, value)
        elif name == 'training' and compat.is_constructed(self):
            raise errors.SetAttributeFrozenModuleError(type(self).__name__, name, value)
        else:
            super().__setattr__(name, value)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        try:
            linen: Any = super()
            return linen.__getattr__(name)
        except AttributeError as error:
            if name in intermediates.fields(self):
                raise intermediates.unset_error(self, name) from error
            if self.scope is None and type(self).setup is not nn.Module.setup:
                raise _NotYetError(
                    f'{type(self).__name__} has no {name!r}; attributes that setup assigns exist '
                    'after model = model.init_bind(rng, *args)'
                ) from error
            raise


def convert(cls: type[M]) -> type[M]:
    """Returns a Linen module class as a `knn.Module` class, always the same one for one class.

    Training flags of its call (`deterministic`, `train`, `use_running_average`, ...) follow
    `training` unless the caller passes them.

    Raises:
        TypeError: if it is not a Linen module class.
    """
    obj: object = cls
    if not isinstance(obj, type) or not issubclass(obj, nn.Module):
        got = obj.__name__ if isinstance(obj, type) else f'a {type(obj).__name__} object'
        raise TypeError(
            f'knn.convert: expected a flax.linen module class, got {got}; to bind a module to '
            'variables, use knn.bind(module, variables)'
        )
    linen: Any = cls
    return cls if issubclass(cls, Module) else _convert(linen)


@functools.cache
def _convert(cls: Any) -> Any:
    names = {name: getattr(cls, name) for name in ('__doc__', '__module__', '__qualname__')}

    @nn.nowrap
    def reduce(self: Any, protocol: Any) -> Any:
        # Pickle looks classes up by name, and by this name finds the class before conversion.
        if type(self) is converted:
            return _make_empty, (cls,), vars(self)
        return object.__reduce_ex__(self, protocol)

    converted = type(cls.__name__, (cls, Module), {**names, '__reduce_ex__': reduce})
    return converted


def _make_empty(cls: Any) -> Any:
    return object.__new__(_convert(cls))


def _surrounding_training(module: Module) -> bool:
    """Returns the training flag of the nearest enclosing Klinen module, or of the call."""
    parent = module.parent
    while isinstance(parent, nn.Module):
        if isinstance(parent, Module):
            return parent.training
        parent = parent.parent
    # No Klinen module around it: the training flag of the call, if this is within one.
    return train_flags.current.get() is not False


def _check_names(cls: Any) -> None:
    """Raises TypeError for members that hide the interface, and for misdeclared intermediates."""
    interface = {name for name in vars(Interface) if not name.startswith('_')}
    for name in sorted(interface & {*vars(cls), *inspect.get_annotations(cls)}):
        raise TypeError(
            f'{cls.__name__}.{name} would override the knn.Module member of that name (see '
            'trainer.klinen.interface); rename it'
        )
    for field in dataclasses.fields(cls):
        if field.init and intermediates.is_marked(field, cls):
            raise TypeError(
                f'{cls.__name__}.{field.name} is a knn.Intermediate, which cannot be an argument '
                'of the constructor: declare it with dataclasses.field(init=False)'
            )


def _wrap_methods(cls: Any) -> None:
    """Makes the methods of a class pass on the training flag and reject unbound calls."""
    owner = next((base for base in cls.__mro__ if '__call__' in vars(base)), Module)
    # The call of a plain Linen class takes flags as arguments; that of a Klinen class reads
    # `self.training`.
    if not issubclass(owner, Module):
        cls.__call__ = _pass_training(owner.__call__)
    for name, value in _methods(cls).items():
        always = name == '__call__' or compat.is_compact(value)
        method = value if name in vars(cls) else _inherited_method(cls, name, value)
        setattr(cls, name, _require_bound(method, always=always))


def _methods(cls: Any) -> dict[str, Any]:
    """Returns the methods of a class and of its Linen bases that may need variables."""
    linens = (*nn.Module.__mro__, Interface)
    # Methods of Klinen bases were wrapped when those classes were created.
    bases = [b for b in cls.__mro__ if b is cls or not (b in linens or issubclass(b, Module))]
    return {
        name: value
        for base in bases
        for name, value in vars(base).items()
        if inspect.getattr_static(cls, name) is value and _may_need_variables(name, value)
    }


def _may_need_variables(name: str, value: Any) -> bool:
    if name == '__call__' or compat.is_compact(value):
        return True
    public = inspect.isfunction(value) and not name.startswith('_') and name != 'setup'
    return public and not compat.is_nowrap(value)


def _inherited_method(cls: Any, name: str, inherited: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that calls the next one in the MRO.

    `inherited` itself would skip the classes that multiple inheritance puts between.
    """

    @functools.wraps(inherited)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    return method


def _require_bound(method: Callable[..., Any], *, always: bool) -> Callable[..., Any]:
    """Makes a method raise `UnboundError` when the module has no variables.

    Args:
        method: the method that needs a bound module.
        always: whether it always needs variables, or only if it calls a method that does.
    """

    @functools.wraps(method)
    def call_if_bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is not None:
            return method(self, *args, **kwargs)
        if always:
            raise unbound_error(self)
        try:
            return method(self, *args, **kwargs)
        except errors.CallCompactUnboundModuleError as error:
            raise unbound_error(self) from error

    return call_if_bound


def _pass_training(method: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the training flag as an argument to a method that does not read `self.training`."""

    @functools.wraps(method)
    def call_with_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = train_flags.with_flags(self, args, kwargs, self.training)
        # An `nn.Sequential` does not hand the flag on to its layers.
        layers = isinstance(self, nn.Sequential)
        with (
            train_flags.pass_training_to_layers(self.training, self)
            if layers
            else contextlib.nullcontext()
        ):
            return method(self, *args, **kwargs)

    return call_with_training
