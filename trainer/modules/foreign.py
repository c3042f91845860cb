# SPDX-License-Identifier: Apache-2.0
"""Error messages for objects that are not models, raised before they are called."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from typing import Any

import flax.linen as nn

from trainer.config import signatures
from trainer.config.errors import UserError

# Other libraries by the package of their classes: what a user calls them, and what to do.
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


def refusal(given: Any) -> str | None:
    """Returns why something that is no module makes none either, or None where it may make one.

    What makes an NNX module is its class, or a function of `rngs`; a function whose argument has
    another name is only known when it is called.

    Args:
        given: what `config.model` has given.
    """
    called = _without_partial(given)
    if isinstance(getattr(called, '__self__', None), nn.Module):  # Such as `module.apply`.
        return f'config.model: {_method_message(called)}'
    if inspect.isroutine(inspect.unwrap(called)):
        return None if _may_take_rngs(given) else f'config.model: {_function_message(given)}'
    if isinstance(called, type):
        return None if _is_nnx_class(called) else f'config.model: {_class_message(called)}'
    # Any object may have a call; that of a foreign model takes its inputs, and has parameters.
    is_factory = callable(given) and not _foreign_library(type(called))
    if is_factory and (takes_rngs(given) or (_may_take_rngs(given) and not _has_arrays(called))):
        return None
    return f'config.model: {_object_message(called)}'


def refusal_of_class(target: Any) -> str | None:
    """Returns why a target that is a class of another library makes no model, before it is called.

    Args:
        target: what `config.model.target` names.
    """
    is_class = isinstance(target, type) and not _is_nnx_class(target)
    if is_class and not issubclass(target, nn.Module) and _foreign_library(target):
        return f'config.model.target: {_class_message(target)}'
    return None


def wrong_result_message(factory: Any, made: Any) -> str:
    """Returns the message for a function of `rngs` that has made no NNX module."""
    if isinstance(made, nn.Module):
        return (
            f'config.model: expected a module of flax.nnx, got a function of `rngs` that returns '
            f'{type(made).__name__}, a module of flax.linen. Make it in a function without the '
            'argument `rngs`'
        )
    if not takes_rngs(factory):
        return f'config.model: {_factory_message(factory)}'
    said = _object_message(made).removeprefix(_EXPECTED)
    return f'config.model: {_EXPECTED}{said.replace("got ", "got a function that returns ", 1)}'


def failure_message(factory: Any, error: Exception) -> str | None:
    """Returns the message for a function of inputs that failed with random streams in their place.

    Returns:
        None for an error of a function that makes a module.
    """
    if takes_rngs(factory) or isinstance(error, UserError) or _is_in_a_module(error):
        return None
    said = str(error).partition('\n')[0]
    return f'config.model: {_factory_message(factory)} (called with `rngs`: {said})'


def takes_rngs(factory: Any) -> bool:
    """Whether a callable has an argument `rngs`."""
    return 'rngs' in signatures.arguments(factory)[0]


def takes_rngs_by_name(factory: Any) -> bool:
    """Whether a callable takes the argument `rngs` by its name."""
    argument = signatures.arguments(factory)[0].get('rngs')
    return argument is not None and argument.kind is not inspect.Parameter.POSITIONAL_ONLY


def _has_arrays(given: Any) -> bool:
    """Whether an object has arrays among its attributes, as a model has its parameters."""
    values = getattr(given, '__dict__', {}).values()
    return any(hasattr(x, 'shape') and hasattr(x, 'dtype') for x in values)


def _is_in_a_module(error: Exception) -> bool:
    """Whether an error came out of a module that was being made."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    makers = (frame.f_locals.get('self') for frame in frames if frame.f_code.co_name == '__init__')
    return any(_is_nnx_class(type(factory)) or isinstance(factory, nn.Module) for factory in makers)


def _may_take_rngs(factory: Any) -> bool:
    if takes_rngs(factory):
        return True
    try:
        inspect.signature(factory).bind(None)
    except TypeError:
        return False
    except ValueError:  # It has no signature.
        return True
    return True


def _is_nnx_class(kind: type) -> bool:
    nnx = sys.modules.get('flax.nnx')  # Such a class has imported it.
    return nnx is not None and issubclass(kind, nnx.Module)


def _foreign_library(kind: type) -> str | None:
    """Returns the package of another library that a class or a base of it is of."""
    packages = [base.__module__.partition('.')[0] for base in kind.__mro__]
    return next((package for package in packages if package in _LIBRARIES), None)


def _object_message(given: Any) -> str:
    kind, library = type(given), _foreign_library(type(given))
    said = f'{_EXPECTED}, got {kind.__name__}'
    if library is not None:
        said += f' of {_LIBRARIES[library][0]}'
    inner = getattr(given, 'module', None)
    if isinstance(inner, nn.Module) or _is_nnx_class(type(inner)):
        return (
            f'{said}. Its attribute `module` is a Flax module ({type(inner).__name__}): let '
            'config.model.target name a function that returns that attribute, and load the weights '
            'with config.init_from'
        )
    return f'{said}. {_advice(library)}'


def _class_message(kind: type) -> str:
    if issubclass(kind, nn.Module):
        return (
            f'expected a module, got the class {kind.__name__} of flax.linen modules; '
            'config.model.target makes a module of it'
        )
    library = _foreign_library(kind)
    of = f' of {_LIBRARIES[library][0]}' if library else ''
    inner = getattr(kind, 'module_class', None)
    if isinstance(inner, type) and issubclass(inner, nn.Module):
        return (
            f'{_EXPECTED}, got the class {kind.__name__}{of}. Its `module_class` is a Flax module: '
            f'let config.model.target name {inner.__module__}:{inner.__name__}, or a function that '
            'returns one, and load the weights with config.init_from'
        )
    return f'{_EXPECTED}, got the class {kind.__name__}{of}. {_advice(library)}'


def _factory_message(given: Any) -> str:
    called = _without_partial(given)
    return (
        _function_message(given)
        if inspect.isroutine(inspect.unwrap(called))
        else _object_message(called)
    )


def _without_partial(given: Any) -> Any:
    while isinstance(given, functools.partial):
        given = given.func
    return given


def _function_message(given: Any) -> str:
    called = _without_partial(given)
    name = getattr(called, '__name__', None) or repr(called)
    try:
        name += f'({", ".join(inspect.signature(given).parameters)})'
    except (TypeError, ValueError):
        name += '(...)'
    return (
        f'{_EXPECTED}, got the function {name}. A model has parameters: write it as a module, or '
        'let config.model.target name a function that returns one (for NNX, a function of `rngs`)'
    )


def _method_message(given: Any) -> str:
    of = type(given.__self__).__name__
    return (
        f'expected a module, got the method {given.__name__!r} of a module ({of}). Let '
        'config.model give the module itself'
    )


def _advice(library: str | None) -> str:
    extra = _LIBRARIES[library][1] if library else ''
    return f'Write the model as a module of Flax{extra}'
