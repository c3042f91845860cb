# SPDX-License-Identifier: Apache-2.0
"""From a name to the object that it names, and what is said where that fails."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import sysconfig
import traceback
from types import ModuleType
from typing import Any

from trainer.config import bundled, misplaced, suggest
from trainer.config.errors import UserError, short_repr

# Where a name without a module is looked for, to say which module was probably meant.
_KNOWN = ('optax', 'trainer.tasks', 'jax.nn', 'flax.linen', 'optax.contrib')

# Where the code lies that is not the user's, for the line of an error.
_LIBRARIES = (
    *(sysconfig.get_path(name) for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')),
    os.path.dirname(os.path.dirname(__file__)),
)


def resolve(name: object, path: str) -> Any:
    """Returns the object that 'package.module:Name' names.

    Args:
        name: module and (dotted) attribute.
        path: the config path, for messages.

    Raises:
        UserError: if the name is malformed, missing, or its module fails to import.
    """
    if not isinstance(name, str) or name.count(':') != 1 or not all(name.split(':')):
        raise UserError(
            f"{path}: expected 'package.module:Name', got {short_repr(name)}{_colon_hint(name)}"
        )
    module_name, _, attribute = name.partition(':')
    if full_name := bundled.full_name(module_name):
        raise UserError(_missing_module_text(name, path, f'{full_name}:{attribute}'))
    try:
        module = _import(module_name, path)
        # `pkgutil.resolve_name` would not tell a missing module from one that fails to import.
        return functools.reduce(getattr, attribute.split('.'), module)
    except AttributeError as error:
        raise UserError(_missing_attribute_text(module, attribute, name, path)) from error
    except _NoModuleError as error:
        near = (
            '' if (hint := misplaced.hint(module_name)) else _nearest_name(module_name, attribute)
        )
        raise UserError(f'{_missing_module_text(name, path, near)} {hint}'.rstrip()) from error


def _colon_hint(name: object) -> str:
    """Returns a hint, if the last dot of a name should be a colon, or its module is missing."""
    module_name, _, attribute = str(name).rpartition('.')
    if not module_name and attribute.isidentifier():
        return _known_module_hint(attribute)
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        found = None
    return '' if found is None else f'. Did you mean {module_name}:{attribute}?'


def _known_module_hint(word: str) -> str:
    for place in _KNOWN:
        try:
            found = getattr(importlib.import_module(place), word, None)
        except ImportError:
            continue
        if callable(found):
            return f'. Did you mean {place}:{word}?'
    return ''


class _NoModuleError(Exception):
    """A module, or a package on the way to it, does not exist."""


def _import(module_name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
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

    For a missing module whose file is near, a sentence says how to import it.
    """
    text = traceback.format_exception_only(error)[-1].strip().partition('\n')[0]
    if isinstance(error, SyntaxError):
        return f'{text} ({error.filename}, line {error.lineno})'
    text = f'{text}{error_location(error)}'
    if isinstance(error, ModuleNotFoundError) and error.name:
        files = [frame.filename for frame in _user_frames(error)]
        full_name = bundled.full_name(error.name)
        hint = f'Did you mean {full_name}?' if full_name else misplaced.hint(error.name, files)
        text = f'{text}. {hint}' if hint else text
    return text


def error_location(error: BaseException) -> str:
    """Returns ' (file.py, line 3)', the last of the user's lines that led to an error, or ''."""
    frames = _user_frames(error)
    return f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    raised = traceback.extract_tb(error.__traceback__)
    return [frame for frame in raised if not is_library(frame.filename)]


def is_library(filename: str) -> bool:
    """Whether a file is Python's, an installed package's or this package's, not the user's."""
    folders = tuple(os.path.join(folder, '') for folder in _LIBRARIES)
    return filename.startswith(('<frozen', *folders))


def _missing_attribute_text(module: ModuleType, attribute: str, name: str, path: str) -> str:
    near = _name_in_package(module.__name__, attribute)
    if not near:
        known = [n for n in dir(module) if not n.startswith('_')]
        word = suggest.nearest_name(attribute, known)
        near = f'{name.partition(":")[0]}:{word}' if word else ''
    hint = f' Did you mean {near}?' if near else ''
    return f'{path}: {short_repr(name)}: the module has no {short_repr(attribute)}.{hint}'


def _missing_module_text(name: str, path: str, near: str) -> str:
    hint = f' Did you mean {near}?' if near else ''
    module = short_repr(name.partition(':')[0])
    return f'{path}: {short_repr(name)}: there is no module {module}.{hint}'


def _name_in_package(module_name: str, attribute: str) -> str:
    """Returns 'package:Name' if the package of a module has the name, else ''."""
    package = module_name.rpartition('.')[0]
    found = package in sys.modules and hasattr(sys.modules[package], attribute.split('.')[0])
    return f'{package}:{attribute}' if found else ''


def _nearest_name(module_name: str, attribute: str) -> str:
    """Returns the name with the most similar module of the same package, or of ours, or ''."""
    package = module_name.rpartition('.')[0]
    if found := _name_in_package(module_name, attribute):
        return found
    if not package:
        near = suggest.nearest_name(module_name, [m.name for m in pkgutil.iter_modules()])
        return f'{near}:{attribute}' if near else ''
    places = [package, f'trainer.{package}'] if package in bundled.PACKAGES else [package]
    names: dict[str, str] = {}
    for place in places:
        loaded = importlib.import_module(place) if place != package else sys.modules.get(place)
        for module in pkgutil.iter_modules(getattr(loaded, '__path__', [])):
            sibling = f'{package}.{module.name}'
            names.setdefault(sibling, bundled.full_name(sibling) or sibling)
    near = suggest.nearest_name(module_name, names)
    return f'{names[near]}:{attribute}' if near else ''
