# SPDX-License-Identifier: Apache-2.0
"""Error messages for config models that are not Flax modules, such as those of other libraries."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import flax.linen as nn

from trainer import compat
from trainer.config import signatures
from trainer.config.errors import UserError

# By the top-level package of a library's classes: its name, and the end of the advice.
_LIBRARIES = {
    'equinox': ('Equinox', ''),
    'haiku': (
        'Haiku',
        ', or call it from a Linen module: params = self.param("net", net.init, x); return '
        'net.apply(params, None, x)',
    ),
    'torch': ('PyTorch', '; config.init_from reads the weights of a PyTorch model into it'),
    'transformers': ('transformers', ''),
    'keras': ('Keras', ''),
    'tensorflow': ('TensorFlow', ''),
    'sonnet': ('Sonnet', ''),
    'objax': ('Objax', ''),
    'penzai': ('Penzai', ''),
    'sklearn': ('scikit-learn', ''),
}
_EXPECTED = 'expected a module of flax.linen or flax.nnx'


def refusal(value: Any) -> str | None:
    """Returns the error message for a value that is not a module and cannot create one, else None.

    An NNX module is created by its class or by a function of `rngs`. If the argument has another
    name, only a call shows whether the function takes `rngs`: see `failure_message`.

    Args:
        value: the value of `config.model`.
    """
    called = _without_partial(value)
    if isinstance(getattr(called, '__self__', None), nn.Module):  # Such as `module.apply`.
        return f'config.model: {_method_message(called)}'
    if inspect.isroutine(inspect.unwrap(called)):
        return None if _may_take_rngs(value) else f'config.model: {_function_message(value)}'
    if isinstance(called, type):
        return None if _is_nnx_class(called) else f'config.model: {_class_message(called)}'
    # Any object may be callable. A model of another library takes inputs and has parameters, a
    # factory does not.
    is_factory = callable(value) and not _foreign_library(type(called))
    if is_factory and (takes_rngs(value) or (_may_take_rngs(value) and not _has_arrays(called))):
        return None
    return f'config.model: {_object_message(called)}'


def refusal_of_class(target: Any) -> str | None:
    """Returns the error message for a target that is another library's class, else None.

    Checked before the class is called, which may be slow or fail with another error.

    Args:
        target: the object that `config.model.target` names.
    """
    is_class = isinstance(target, type) and not _is_nnx_class(target)
    if is_class and not issubclass(target, nn.Module) and _foreign_library(target):
        return f'config.model.target: {_class_message(target)}'
    return None


def wrong_result_message(factory: Any, result: Any) -> str:
    """Returns the message for a function of `rngs` that did not return an NNX module."""
    if isinstance(result, nn.Module):
        return (
            f'config.model: expected a module of flax.nnx, got a function of `rngs` that returns '
            f'{type(result).__name__}, a module of flax.linen. Create it in a function without the '
            'argument `rngs`'
        )
    # Without an argument `rngs`, this is more likely a function of the model's inputs.
    if not takes_rngs(factory):
        return f'config.model: {_factory_message(factory)}'
    text = _object_message(result).removeprefix(_EXPECTED)
    return f'config.model: {_EXPECTED}{text.replace("got ", "got a function that returns ", 1)}'


def failure_message(factory: Any, error: Exception) -> str | None:
    """Returns the message for a function of inputs that failed when called with `nnx.Rngs`.

    Returns:
        The message; None if the function creates a module, so that the error is the user's own.
    """
    if takes_rngs(factory) or isinstance(error, UserError) or _is_in_a_module(error):
        return None
    reason = str(error).partition('\n')[0]
    return f'config.model: {_factory_message(factory)} (called with `rngs`: {reason})'


def takes_rngs(factory: Any) -> bool:
    """Whether a callable has an argument `rngs`."""
    return 'rngs' in signatures.arguments(factory)[0]


def takes_rngs_by_name(factory: Any) -> bool:
    """Whether a callable takes the argument `rngs` by its name."""
    argument = signatures.arguments(factory)[0].get('rngs')
    return argument is not None and argument.kind is not inspect.Parameter.POSITIONAL_ONLY


def _has_arrays(value: Any) -> bool:
    """Whether an object has arrays among its attributes, as a model has its parameters."""
    values = getattr(value, '__dict__', {}).values()
    return any(hasattr(x, 'shape') and hasattr(x, 'dtype') for x in values)


def _is_in_a_module(error: Exception) -> bool:
    """Whether an error was raised within the constructor of a module."""
    owners = compat.objects_under_construction(error)
    return any(_is_nnx_class(type(owner)) or isinstance(owner, nn.Module) for owner in owners)


def _may_take_rngs(factory: Any) -> bool:
    if takes_rngs(factory):
        return True
    try:
        inspect.signature(factory).bind(None)
    except TypeError:
        return False
    except ValueError:  # Builtins may have no signature.
        return True
    return True


def _is_nnx_class(kind: type) -> bool:
    nnx = sys.modules.get('flax.nnx')  # Without this import there are no NNX classes.
    return nnx is not None and issubclass(kind, nnx.Module)


def _foreign_library(kind: type) -> str | None:
    """Returns the package of another library that defines the class or one of its bases."""
    packages = [base.__module__.partition('.')[0] for base in kind.__mro__]
    return next((package for package in packages if package in _LIBRARIES), None)


def _object_message(value: Any) -> str:
    kind, library = type(value), _foreign_library(type(value))
    text = f'{_EXPECTED}, got {kind.__name__}'
    if library is not None:
        text += f' of {_LIBRARIES[library][0]}'
    # Models of `transformers` wrap a Flax module and its parameters.
    inner = getattr(value, 'module', None)
    if isinstance(inner, nn.Module) or _is_nnx_class(type(inner)):
        return (
            f'{text}. Its attribute `module` is a Flax module ({type(inner).__name__}): set '
            'config.model.target to a function that returns that attribute, and load the weights '
            'with config.init_from'
        )
    return f'{text}. {_advice(library)}'


def _class_message(kind: type) -> str:
    if issubclass(kind, nn.Module):
        return (
            f'expected a module, got the flax.linen module class {kind.__name__}; use it as '
            'config.model.target to create a module'
        )
    library = _foreign_library(kind)
    of = f' of {_LIBRARIES[library][0]}' if library else ''
    # Model classes of `transformers` name their Flax module.
    inner = getattr(kind, 'module_class', None)
    if isinstance(inner, type) and issubclass(inner, nn.Module):
        return (
            f'{_EXPECTED}, got the class {kind.__name__}{of}. Its `module_class` is a Flax module: '
            f'set config.model.target to {inner.__module__}:{inner.__name__}, or to a function '
            'that returns one, and load the weights with config.init_from'
        )
    return f'{_EXPECTED}, got the class {kind.__name__}{of}. {_advice(library)}'


def _factory_message(value: Any) -> str:
    called = _without_partial(value)
    return (
        _function_message(value)
        if inspect.isroutine(inspect.unwrap(called))
        else _object_message(called)
    )


def _without_partial(value: Any) -> Any:
    while isinstance(value, functools.partial):
        value = value.func
    return value


def _function_message(value: Any) -> str:
    called = _without_partial(value)
    name = getattr(called, '__name__', None) or repr(called)
    try:
        name += f'({", ".join(inspect.signature(value).parameters)})'
    except (TypeError, ValueError):
        name += '(...)'
    return (
        f'{_EXPECTED}, got the function {name}. A model has parameters: write it as a module, or '
        'set config.model.target to a function that returns one (for NNX, a function of `rngs`)'
    )


def _method_message(method: Any) -> str:
    owner = type(method.__self__).__name__
    return (
        f'expected a module, got the method {method.__name__!r} of a module ({owner}). Set '
        'config.model to the module itself'
    )


def _advice(library: str | None) -> str:
    extra = _LIBRARIES[library][1] if library else ''
    return f'Write the model as a Flax module{extra}'
