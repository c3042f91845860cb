# SPDX-License-Identifier: Apache-2.0
"""Imports the object that 'package.module:Name' names, with helpful messages if that fails."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from types import ModuleType
from typing import Any

from trainer.config import bundled, misplaced, suggest
from trainer.config.errors import UserError, error_location, short_repr, user_frames

# Modules that are searched for a name without a module, to suggest the full name.
_KNOWN_MODULES = ('optax', 'trainer.tasks', 'jax.nn', 'flax.linen', 'optax.contrib')


class Named(str):
    """The name of an object that is not found by it, such as a class of a notebook.

    Attributes:
        value: the object.
    """

    value: Any

    def __new__(cls, name: str, value: Any) -> Named:
        """Returns the name with its object."""
        named = super().__new__(cls, name)
        named.value = value
        return named

    def __deepcopy__(self, memo: Any) -> Named:
        """Returns itself: the copy of a config has the same objects."""
        return self


def resolve(name: object, path: str) -> Any:
    """Returns the object that 'package.module:Name' names.

    Args:
        name: module and attribute, which may be dotted: 'package.module:Class.method'.
        path: key path of the name, for messages.

    Raises:
        UserError: if the name is malformed or does not exist, or if its module fails to import.
    """
    if isinstance(name, Named):
        return name.value
    if not isinstance(name, str) or name.count(':') != 1 or not all(name.split(':')):
        raise UserError(
            f"{path}: expected 'package.module:Name', got {short_repr(name)}{_colon_hint(name)}"
        )
    module_name, _, attribute = name.partition(':')
    # Refused although Python could import it: under two names, each class would exist twice.
    if full_name := bundled.full_name(module_name):
        raise UserError(_missing_module_text(name, path, f'{full_name}:{attribute}'))
    try:
        module = _import(module_name, path)
        # `pkgutil.resolve_name` raises the same for a missing module and a failing import.
        return functools.reduce(getattr, attribute.split('.'), module)
    except AttributeError as error:
        raise UserError(_missing_attribute_text(module, attribute, name, path)) from error
    except _NoModuleError as error:
        # A file of exactly that name is a better answer than a module with a similar one.
        hint = misplaced.hint(module_name)
        nearest = '' if hint else _nearest_name(module_name, attribute)
        raise UserError(f'{_missing_module_text(name, path, nearest)} {hint}'.rstrip()) from error


def _colon_hint(name: object) -> str:
    """Returns a hint for 'optax.adam' (a dot in place of the colon) and for 'adam'."""
    module_name, _, attribute = str(name).rpartition('.')
    if not module_name and attribute.isidentifier():
        return _known_module_hint(attribute)
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    return '' if spec is None else f'. Did you mean {module_name}:{attribute}?'


def _known_module_hint(word: str) -> str:
    for module_name in _KNOWN_MODULES:
        try:
            value = getattr(importlib.import_module(module_name), word, None)
        except ImportError:
            continue
        if callable(value):
            return f'. Did you mean {module_name}:{word}?'
    return ''


class _NoModuleError(Exception):
    """A module, or one of its parent packages, does not exist."""


def _import(module_name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Otherwise the module exists, and another one that it imports is missing.
        if error.name and (module_name == error.name or module_name.startswith(f'{error.name}.')):
            raise _NoModuleError from error
        raise UserError(_import_failure_text(module_name, error, path)) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(_import_failure_text(module_name, error, path)) from error


def _import_failure_text(module_name: str, error: BaseException, path: str) -> str:
    return f'{path}: importing {module_name} failed: {last_line(error)}'


def last_line(error: BaseException) -> str:
    """Returns 'NameError: ... (file.py, line 3)' for an exception raised in the user's file.

    For a missing module whose file exists elsewhere, a sentence says how to import it.
    """
    text = traceback.format_exception_only(error)[-1].strip().partition('\n')[0]
    # No frame of a traceback is in a file that could not be compiled.
    if isinstance(error, SyntaxError):
        return f'{text} ({error.filename}, line {error.lineno})'
    text = f'{text}{error_location(error)}'
    if isinstance(error, ModuleNotFoundError) and error.name:
        files = [frame.filename for frame in user_frames(error)]
        full_name = bundled.full_name(error.name)
        hint = f'Did you mean {full_name}?' if full_name else misplaced.hint(error.name, files)
        text = f'{text}. {hint}' if hint else text
    return text


def _missing_attribute_text(module: ModuleType, attribute: str, name: str, path: str) -> str:
    nearest = _name_in_package(module.__name__, attribute)
    if not nearest:
        names = [n for n in dir(module) if not n.startswith('_')]
        word = suggest.nearest_name(attribute, names)
        nearest = f'{name.partition(":")[0]}:{word}' if word else ''
    hint = f' Did you mean {nearest}?' if nearest else ''
    return f'{path}: {short_repr(name)}: the module has no {short_repr(attribute)}.{hint}'


def _missing_module_text(name: str, path: str, nearest: str) -> str:
    hint = f' Did you mean {nearest}?' if nearest else ''
    module = short_repr(name.partition(':')[0])
    return f'{path}: {short_repr(name)}: there is no module {module}.{hint}'


def _name_in_package(module_name: str, attribute: str) -> str:
    """Returns 'package:Name' if the parent package of a module has the attribute, else ''."""
    package = module_name.rpartition('.')[0]
    exists = package in sys.modules and hasattr(sys.modules[package], attribute.split('.')[0])
    return f'{package}:{attribute}' if exists else ''


def _nearest_name(module_name: str, attribute: str) -> str:
    """Returns the name with the most similar module of the same package, '' if there is none."""
    package = module_name.rpartition('.')[0]
    if name := _name_in_package(module_name, attribute):
        return name
    if not package:
        nearest = suggest.nearest_name(module_name, [m.name for m in pkgutil.iter_modules()])
        return f'{nearest}:{attribute}' if nearest else ''
    # `models.cmn:CNN` may mean a module of the user's own package or a bundled one.
    packages = [package, f'trainer.{package}'] if package in bundled.PACKAGES else [package]
    names: dict[str, str] = {}
    for each in packages:
        # The user's package was imported on the way to the missing module, if it exists.
        parent = importlib.import_module(each) if each != package else sys.modules.get(each)
        for module in pkgutil.iter_modules(getattr(parent, '__path__', [])):
            sibling = f'{package}.{module.name}'
            names.setdefault(sibling, bundled.full_name(sibling) or sibling)
    nearest = suggest.nearest_name(module_name, names)
    return f'{names[nearest]}:{attribute}' if nearest else ''
