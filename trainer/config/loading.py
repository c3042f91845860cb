# SPDX-License-Identifier: Apache-2.0
"""Loads a config: a file (`configs/mnist.py:argument`, or `mnist`), or a ConfigDict of Python."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from trainer import compat
from trainer.config import (
    bundled,
    config_arguments,
    literals,
    misplaced,
    objects,
    places,
    python_objects,
    suggest,
)
from trainer.config.errors import UserError, short_repr
from trainer.config.schema import REQUIRED


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config as its file returned it, or as a program made it.

    Attributes:
        config: the result of `get_config`; overrides change it in place.
        name: name of the file without '.py'; 'config' without a file.
        arg: the argument, the text after the colon of --config=FILE:ARG.
        path: the file, or None if the config was made in Python.
    """

    config: ml_collections.ConfigDict
    name: str
    arg: str
    path: pathlib.Path | None


def load(spec: str) -> LoadedConfig:
    """Loads a config by calling the `get_config` of its file.

    Args:
        spec: PATH or PATH:ARGUMENT. A PATH of 'configs/NAME.py' or NAME is a bundled config, unless
            there is such a file in the current directory.

    Raises:
        UserError: if the file does not exist, fails, or returns no config.
    """
    text, colon, arg = spec.partition(':')
    path = _find_file(text)
    get_config = _get_config(path)
    args = _arguments(get_config, path, arg if colon else None)
    try:
        config = get_config(*args)
    except UserError:
        raise
    except Exception as error:
        hint = ''
        if compat.is_dotted_key(error):
            hint = (
                "\nNest dicts instead: {'optimizer': {'learning_rate': ...}}; in place of a key "
                "such as '12.5%', write a whole number of steps"
            )
        if compat.is_type_change(error):
            hint = (
                '\nA config contains descriptions of objects, not objects: config.optimizer = '
                "dict(target='optax:adam', learning_rate=1e-3)"
            )
        text = f'{path}: get_config failed: {objects.last_line(error)}'
        if args:
            hint += config_arguments.describe(arg, config_arguments.known_arguments(get_config))
        # `SIZES[arg]` raises KeyError(arg), whose text would be nothing but the argument.
        if args and isinstance(error, LookupError) and error.args == (arg,):
            text = f'{path}: get_config does not know the argument {short_repr(arg)}.'
        if hint.startswith(' It') and not text.endswith('.'):
            text += '.'
        raise UserError(f'{text}{hint}') from error
    # A `match` without a default case returns None.
    if config is None and args:
        hint = config_arguments.describe(arg, config_arguments.known_arguments(get_config))
        raise UserError(
            f'{path}: get_config returns None for the argument {short_repr(arg)}.{hint}'
        )
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'{path}: get_config must return an ml_collections.ConfigDict, got '
            f'{type(config).__name__}'
        )
    config = _checked_copy(config, f'{path}: ')
    return LoadedConfig(config=config, name=path.stem, arg=arg, path=path)


def from_python(config: Any) -> LoadedConfig:
    """Returns a config that was made in Python, as `load` returns that of a file.

    Args:
        config: an `ml_collections.ConfigDict`, which stays as it is: overrides change a copy. It
            may have objects in place of names.

    Raises:
        UserError: if it is anything else, or has values that a config cannot have.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        given = short_repr(config) if isinstance(config, str) else f'a {type(config).__name__}'
        hint = ''
        if isinstance(config, Mapping):
            hint = '; convert it: ml_collections.ConfigDict(config)'
        elif isinstance(config, str):
            hint = f'; for a file, write load_and_build({given})'
        raise UserError(f'build: expected an ml_collections.ConfigDict, got {given}{hint}')
    try:
        to_plain(config)  # Fails for a config that contains itself.
        check_vars(config)
        named = python_objects.name_objects(config)
    except RecursionError as error:
        raise UserError('config: a dict of the config contains itself') from error
    # With references of its own, so that overrides do not change those of the caller.
    config = _checked_copy(copy.deepcopy(named), 'config: ')
    return LoadedConfig(config=config, name='config', arg='', path=None)


def _checked_copy(config: ml_collections.ConfigDict, where: str) -> ml_collections.ConfigDict:
    """Returns a copy in which each key has a dict of its own.

    Args:
        config: the config.
        where: the beginning of messages.

    Raises:
        UserError: if it contains itself, an unused key of `vars`, or a value of another type.
    """
    try:
        to_plain(config)
        # Before the copy: the identity of references shows which ones are used.
        check_vars(config)
        literals.check(to_plain(config), 'config', [])
    except RecursionError as error:
        raise UserError(f'{where}a dict of the config contains itself') from error
    return _copy_unshared(config)


def to_plain(node: Any) -> Any:
    """Returns a config as plain dicts, lists and tuples, with references replaced by their values.

    A required placeholder without a value becomes `REQUIRED`.
    """
    if isinstance(node, ml_collections.FieldReference):
        try:
            return to_plain(node.get())
        except config_dict.RequiredValueError:
            return REQUIRED
    if isinstance(node, ml_collections.ConfigDict):
        try:
            # With references: reading an empty placeholder as a value would raise.
            items = node.items(preserve_field_references=True)
        except TypeError as error:  # ConfigDict sorts its keys, and cannot compare 1 with 'a'.
            raise UserError(f'a dict of the config mixes names and other keys: {error}') from error
        return {k: to_plain(v) for k, v in items}
    if isinstance(node, dict):
        return {key: to_plain(value) for key, value in node.items()}
    if type(node) in (tuple, list):  # Not an object that is a tuple, such as an optimizer.
        return type(node)(to_plain(value) for value in node)
    return node


def _find_file(text: str) -> pathlib.Path:
    path = pathlib.Path(places.expand(text, '--config'))
    try:
        for candidate in _candidates(path):
            if candidate.is_file():
                return candidate
        is_directory = path.is_dir()
    except OSError as error:  # A name that is too long, or a folder without read permission.
        raise UserError(f'--config: {short_repr(text)}: {error.strerror or error}') from error
    if is_directory:
        raise UserError(f'--config: {short_repr(text)} is a directory; name a file in it')
    hint = ''
    # The path as it is, and its last part as a file in `configs`: `mnits`, or `configs.mnist`.
    stem = path.name.removesuffix('.py').split('.')[-1]
    for guess in (path, pathlib.Path('configs', f'{stem}.py')):
        folders = {each.parent for each in _candidates(guess) if each.name == guess.name}
        files = [p.name for folder in folders if folder.is_dir() for p in folder.glob('*.py')]
        nearest = suggest.nearest_name(guess.name, sorted(files))
        hint = hint or (f' Did you mean {guess.parent / nearest}?' if nearest else '')
    raise UserError(f'--config: there is no file {short_repr(text)}.{hint}')


def _candidates(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files that --config=PATH may mean, the user's before bundled ones."""
    yield path
    if path.parts[:1] == ('configs',):
        yield bundled.FOLDER / path
    if not path.suffix and len(path.parts) == 1:  # mnist
        for folder in (pathlib.Path('configs'), bundled.FOLDER / 'configs'):
            yield folder / f'{path.name}.py'


def _get_config(path: pathlib.Path) -> Callable[..., Any]:
    name = f'{misplaced.CONFIG_PREFIX}{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f'--config: {path} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look up the module of a class by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f'{path} fails to import: {objects.last_line(error)}') from error
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise UserError(f'{path} has no function get_config()')
    return get_config


def _arguments(
    get_config: Callable[..., Any], path: pathlib.Path, arg: str | None
) -> tuple[str, ...]:
    """Returns the arguments for `get_config`: the text after the colon, if it takes one."""
    signature = inspect.signature(get_config)
    if arg and not signature.parameters:
        raise UserError(f'{path}: get_config() takes no argument, got {short_repr(arg)}')
    args = (arg,) if arg is not None and signature.parameters else ()
    try:
        signature.bind(*args)
    except TypeError as error:
        raise UserError(
            f'{path}: get_config cannot be called: {error}. It gets at most one argument, the text '
            f"after the colon of --config={path}:TEXT; declare it as get_config(arg='')"
        ) from error
    return args


def _copy_unshared(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy in which each key has a dict of its own, even if the file uses one twice.

    Otherwise an override of one of the keys would also change the other. References remain shared,
    since that is their purpose.
    """
    unshared = ml_collections.ConfigDict(allow_dotted_keys=True)
    for key, value in config.items(preserve_field_references=True):
        is_dict = isinstance(value, ml_collections.ConfigDict)
        unshared[key] = _copy_unshared(value) if is_dict else value
    return unshared


def check_vars(config: ml_collections.ConfigDict) -> None:
    """Checks that each key of `config.vars` is referenced by another key of the config.

    Raises:
        UserError: for a key that is not referenced, since setting it would have no effect.
    """
    if 'vars' not in config:
        return
    if not isinstance(config.vars, ml_collections.ConfigDict):
        raise UserError(f'config.vars: expected a dict, got {short_repr(config.vars)}')
    used: set[int] = set()
    for key, value in config.items(preserve_field_references=True):
        if key != 'vars':
            _collect_references(value, used)
    for key, value in config.vars.items(preserve_field_references=True):
        if id(value) not in used:
            raise UserError(
                f'config.vars.{key} is not used: reference it, as in '
                f"config.model.x = config.vars.get_ref('{key}')"
            )


def _collect_references(node: Any, used: set[int]) -> None:
    """Adds the ids of all references in a node, and of those that they are computed from."""
    if isinstance(node, ml_collections.FieldReference):
        used.add(id(node))
        _collect_references(tuple(compat.reference_inputs(node)), used)
    elif isinstance(node, ml_collections.ConfigDict):
        for _, value in node.items(preserve_field_references=True):
            _collect_references(value, used)
    elif isinstance(node, dict):
        _collect_references(tuple(node.values()), used)
    elif isinstance(node, (tuple, list)):
        for value in node:
            _collect_references(value, used)
