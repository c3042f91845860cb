# SPDX-License-Identifier: Apache-2.0
"""Loads a config file: `configs/mnist.py` or `configs/mnist.py:argument`."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pathlib
from typing import Any

import ml_collections

from trainer import bundled
from trainer.config import suggest, targets
from trainer.config.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config file's result.

    Attributes:
        config: what `get_config` returned; overrides change it in place.
        name: the file's name without '.py'.
        arg: what stood after the colon.
        path: the file.
    """

    config: ml_collections.ConfigDict
    name: str
    arg: str
    path: pathlib.Path


def load(spec: str) -> LoadedConfig:
    """Runs `get_config` of a file.

    Args:
        spec: path, or path:argument. A path that does not exist here may name a bundled config.

    Raises:
        UserError: if the file is missing, fails, or returns something else.
    """
    text, colon, arg = spec.partition(':')
    path = _find(text)
    get_config = _get_config(path)
    takes_arg = bool(inspect.signature(get_config).parameters)
    if arg and not takes_arg:
        raise UserError(f'{path}: get_config() takes no argument, got {arg!r}')
    try:
        config = get_config(arg) if colon and takes_arg else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{path}: get_config failed: {targets.last_line(error)}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f'{path}: get_config must return an ml_collections.ConfigDict, got '
            f'{type(config).__name__}'
        )
    check_vars(config)
    return LoadedConfig(config=_unshared(config), name=path.stem, arg=arg, path=path)


def plain(node: Any) -> Any:
    """Returns a config as plain dicts, lists and tuples, its references resolved."""
    if isinstance(node, ml_collections.FieldReference):
        return plain(node.get())
    if isinstance(node, (ml_collections.ConfigDict, dict)):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return type(node)(plain(value) for value in node)
    return node


def _find(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    for candidate in (path, *(pathlib.Path(root) / path for root in bundled.__path__)):
        if candidate.is_file():
            return candidate
    folders = [path.parent, *(pathlib.Path(root) / path.parent for root in bundled.__path__)]
    files = [p.name for folder in folders if folder.is_dir() for p in folder.glob('*.py')]
    near = suggest.nearest(path.name, files)
    hint = f' Did you mean {path.parent / near}?' if near else ''
    raise UserError(f'--config: there is no file {text!r}.{hint}')


def _get_config(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
    if spec is None or spec.loader is None:
        raise UserError(f'--config: {path} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f'{path} fails to import: {targets.last_line(error)}') from error
    get_config = getattr(module, 'get_config', None)
    if not callable(get_config):
        raise UserError(f'{path} has no function get_config()')
    return get_config


def _unshared(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a copy where a dict that the file uses in two places is two: an override changes one.

    References stay references.
    """
    copy = ml_collections.ConfigDict(allow_dotted_keys=True)
    for key, value in config.items(preserve_field_references=True):
        copy[key] = _unshared(value) if isinstance(value, ml_collections.ConfigDict) else value
    return copy


def check_vars(config: ml_collections.ConfigDict) -> None:
    """Checks that each key of `config.vars` is referenced by a key outside of it.

    Raises:
        UserError: for one that is not: changing it would change nothing.
    """
    if 'vars' not in config:
        return
    used: set[int] = set()
    for key, value in config.items(preserve_field_references=True):
        if key != 'vars':
            _collect_references(value, used)
    for key, value in config.vars.items(preserve_field_references=True):
        if id(value) not in used:
            raise UserError(
                f'config.vars.{key} is read by nothing: reference it, as in '
                f"config.model.x = config.vars.get_ref('{key}')"
            )


def _collect_references(node: Any, used: set[int]) -> None:
    """Adds the identity of every reference below a node, and of those it is computed from."""
    if isinstance(node, ml_collections.FieldReference):
        used.add(id(node))
        _collect_references(node._value, used)  # the reference that an operation started from
        for operation in node._ops:
            _collect_references(tuple(operation.args), used)
    elif isinstance(node, ml_collections.ConfigDict):
        for _, value in node.items(preserve_field_references=True):
            _collect_references(value, used)
    elif isinstance(node, dict):
        _collect_references(tuple(node.values()), used)
    elif isinstance(node, (tuple, list)):
        for value in node:
            _collect_references(value, used)
