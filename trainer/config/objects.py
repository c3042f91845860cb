# SPDX-License-Identifier: Apache-2.0
"""From a name to the object that it names, and what is said where that fails."""

from __future__ import annotations

import ast
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

from trainer.config import suggest
from trainer.config.errors import UserError, shown

# Packages that come with the trainer, and may be hidden by the user's own of the same name.
_BUNDLED = ('models', 'data', 'configs')

# Where a name without a module is looked for, to say which module was probably meant.
_KNOWN = ('optax', 'trainer.tasks.task', 'jax.nn', 'flax.linen', 'optax.contrib')

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
            f"{path}: expected 'package.module:Name', got {shown(name)}{_with_colon(name)}"
        )
    module_name, _, attribute = name.partition(':')
    error: UserError | None = None
    for candidate in _candidates(module_name):
        try:
            module = _import(candidate, path)
            _check_not_hidden(candidate, attribute, path)
            # `pkgutil.resolve_name` would not tell a missing module from one that fails to import.
            return functools.reduce(getattr, attribute.split('.'), module)
        except AttributeError:
            error = error or UserError(_no_attribute(module, attribute, name, path))
        except _NoModuleError:
            error = error or UserError(_no_module(module_name, name, path))
    assert error is not None
    raise error


def _with_colon(name: object) -> str:
    """Returns a hint, if the last dot of a name should be a colon, or its module is missing."""
    module_name, _, attribute = str(name).rpartition('.')
    if not module_name and attribute.isidentifier():
        return _in_known_module(attribute)
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        found = None
    return '' if found is None else f'. Did you mean {module_name}:{attribute}?'


def _in_known_module(word: str) -> str:
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


def _candidates(module_name: str) -> list[str]:
    bundled = module_name.split('.')[0] in _BUNDLED
    return [module_name, f'trainer.bundled.{module_name}'] if bundled else [module_name]


def _import(module_name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f'{error.name}.')):
            raise _NoModuleError from error
        raise UserError(_failed_import(module_name, error, path)) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failed_import(module_name, error, path)) from error


def _check_not_hidden(module_name: str, attribute: str, path: str) -> None:
    """Checks that a module of ours is not taken for one of the user's with the same name.

    A folder `models` without an `__init__.py` comes after our package of that name, in its path.

    Raises:
        UserError: if the user's file defines the attribute.
    """
    package, _, rest = module_name.partition('.')
    if package not in _BUNDLED or not rest:
        return
    for folder in list(getattr(sys.modules.get(package), '__path__', ()))[1:]:
        file = os.path.join(folder, *rest.split('.')) + '.py'
        mine = getattr(sys.modules[module_name], '__file__', None)
        if os.path.isfile(file) and file != mine and attribute.split('.')[0] in _defined(file):
            raise UserError(
                f'{path}: {module_name}:{attribute} is in {file} too, which is hidden by {mine}; '
                f'add an empty {os.path.join(folder, "__init__.py")}, or rename the file'
            )


def _defined(file: str) -> set[str]:
    """Returns the names of the classes and functions of a file, without running it."""
    try:
        with open(file, 'rb') as opened:
            body = ast.parse(opened.read()).body
    except (OSError, SyntaxError, ValueError):
        return set()
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in body if isinstance(node, kinds)}


def _failed_import(module_name: str, error: BaseException, path: str) -> str:
    return f'{path}: importing {module_name} failed: {last_line(error)}'


def last_line(error: BaseException) -> str:
    """Returns 'NameError: ... (file.py, line 3)' for an exception raised in the user's file."""
    text = traceback.format_exception_only(error)[-1].strip().partition('\n')[0]
    if isinstance(error, SyntaxError):
        return f'{text} ({error.filename}, line {error.lineno})'
    return f'{text}{place(error)}'


def place(error: BaseException) -> str:
    """Returns ' (file.py, line 3)', the last of the user's lines that led to an error, or ''."""
    raised = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in raised if not is_library(frame.filename)]
    return f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''


def is_library(filename: str) -> bool:
    """Whether a file is Python's, an installed package's or this package's, not the user's."""
    folders = tuple(os.path.join(folder, '') for folder in _LIBRARIES)
    return filename.startswith(('<frozen', *folders))


def _no_attribute(module: ModuleType, attribute: str, name: str, path: str) -> str:
    near = suggest.nearest(attribute, [n for n in dir(module) if not n.startswith('_')])
    hint = f' Did you mean {name.partition(":")[0]}:{near}?' if near else ''
    return f'{path}: {shown(name)}: the module has no {shown(attribute)}.{hint}'


def _no_module(module_name: str, name: str, path: str) -> str:
    package = module_name.rpartition('.')[0]
    siblings: list[str] = []
    if package:
        loaded = sys.modules.get(package) or sys.modules.get(f'trainer.bundled.{package}')
        siblings = [m.name for m in pkgutil.iter_modules(getattr(loaded, '__path__', []))]
        siblings = [f'{package}.{s}' for s in siblings]
    else:
        siblings = [m.name for m in pkgutil.iter_modules()]
    near = suggest.nearest(module_name, siblings)
    hint = f' Did you mean {near}:{name.partition(":")[2]}?' if near else ''
    return f'{path}: {shown(name)}: there is no module {shown(module_name)}.{hint}'
