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
    """A name that a model has only after `init_bind`; `hasattr` asks for the second base."""


class Module(Interface, nn.Module):
    """A Linen module with a mode, that `init_bind` binds to its variables.

    Attributes:
        training: whether the model trains; the parts of a model follow it.
    """

    if TYPE_CHECKING:
        # For a type checker no field, or those of a subclass would need defaults.
        @property
        def training(self) -> bool:
            """Whether the model trains."""

    else:
        training: bool = dataclasses.field(default=True, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
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
                    'lose: give it part.clone(), and the variables to model.with_variables(...)'
                )
        self._inherit_evaluation()

    @nn.nowrap
    def with_variables(self, variables: Mapping[str, Any]) -> Self:
        """Returns a bound copy: see `Interface`, whose own method is for what is bound already."""
        return bind(self, variables)

    @nn.nowrap
    def _inherit_evaluation(self) -> None:
        """Takes evaluation mode over from the module around it, and hands it on."""
        if self.training and not _surrounding_training(self):
            object.__setattr__(self, 'training', False)
            for name in train_flags.fields(self):
                for part in intermediates.modules_in(getattr(self, name)):
                    if isinstance(part, Module):
                        part._inherit_evaluation()

    @nn.nowrap
    def __setattr__(self, name: str, value: Any) -> None:
        if name in intermediates.fields(self):
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
                    f'{type(self).__name__} has no {name!r}; what its setup makes is there after '
                    'model = model.init_bind(rng, *args)'
                ) from error
            raise


def convert(cls: type[M]) -> type[M]:
    """Returns the class as a `knn.Module`; the same class gives the same one.

    Flags of its call that say the mode (`deterministic`, `train`, `use_running_average`, ...)
    follow `training` where the caller does not give them.

    Raises:
        TypeError: if it is no class of Linen modules.
    """
    given: object = cls
    if not isinstance(given, type) or not issubclass(given, nn.Module):
        got = given.__name__ if isinstance(given, type) else f'an object of {type(given).__name__}'
        raise TypeError(
            f'knn.convert: expected a class of flax.linen modules, got {got}; a module with its '
            'variables goes to knn.bind(module, variables)'
        )
    linen: Any = cls
    return cls if issubclass(cls, Module) else _convert(linen)


@functools.cache
def _convert(cls: Any) -> Any:
    names = {name: getattr(cls, name) for name in ('__doc__', '__module__', '__qualname__')}

    @nn.nowrap
    def reduce(self: Any, protocol: Any) -> Any:
        # By name, pickle would find the class that was converted.
        if type(self) is made:
            return _make_empty, (cls,), vars(self)
        return object.__reduce_ex__(self, protocol)

    made = type(cls.__name__, (cls, Module), {**names, '__reduce_ex__': reduce})
    return made


def _make_empty(cls: Any) -> Any:
    return object.__new__(_convert(cls))


def _surrounding_training(module: Module) -> bool:
    """Returns the training flag of the nearest enclosing Klinen module, or of the call."""
    parent = module.parent
    while isinstance(parent, nn.Module):
        if isinstance(parent, Module):
            return parent.training
        parent = parent.parent
    return train_flags.current.get() is not False


def _check_names(cls: Any) -> None:
    """Refuses fields and methods that would not be what they look like."""
    interface = {name for name in vars(Interface) if not name.startswith('_')}
    for name in sorted(interface & {*vars(cls), *inspect.get_annotations(cls)}):
        raise TypeError(
            f'{cls.__name__}.{name} would hide what every knn.Module has by that name (see '
            'trainer.klinen.interface); give it another name'
        )
    for field in dataclasses.fields(cls):
        if field.init and intermediates.is_marked(field, cls):
            raise TypeError(
                f'{cls.__name__}.{field.name} is a knn.Intermediate, which no caller gives: it '
                'must be a dataclasses.field(init=False), with a default_factory or without'
            )


def _wrap_methods(cls: Any) -> None:
    """Makes the methods of a class pass on the training flag, and reject unbound calls."""
    owner = next((base for base in cls.__mro__ if '__call__' in vars(base)), Module)
    if not issubclass(owner, Module):
        cls.__call__ = _pass_training(owner.__call__)
    for name, value in _methods(cls).items():
        always = name == '__call__' or compat.is_compact(value)
        method = value if name in vars(cls) else _inherited_method(cls, name, value)
        setattr(cls, name, _require_bound(method, always=always))


def _methods(cls: Any) -> dict[str, Any]:
    """Returns the methods that a class has from itself, and those from Linen classes around it."""
    linens = (*nn.Module.__mro__, Interface)
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
    """Returns the method that a class inherits, from whatever class follows it in a subclass."""

    @functools.wraps(inherited)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    return method


def _require_bound(method: Callable[..., Any], *, always: bool) -> Callable[..., Any]:
    """Refuses a call that has no variables, before Linen does so in its own words.

    Args:
        method: of a module.
        always: whether it needs variables in any case, or only if it calls what does.
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
    """Passes the training flag to a method that does not read `self.training`."""

    @functools.wraps(method)
    def call_with_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = train_flags.with_flags(self, args, kwargs, self.training)
        layers = isinstance(self, nn.Sequential)
        with (
            train_flags.pass_training_to_layers(self.training, self)
            if layers
            else contextlib.nullcontext()
        ):
            return method(self, *args, **kwargs)

    return call_with_training
