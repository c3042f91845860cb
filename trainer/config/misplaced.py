# SPDX-License-Identifier: Apache-2.0
"""Modules of the user's own that Python does not find, although their files are near."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

# Config files are loaded as modules with such names.
CONFIG_PREFIX = '_config_'


def hint(module_name: str, files: Iterable[str] = ()) -> str:
    """Returns a sentence on where the file of a missing module is, and what to do; or ''.

    The file is looked for in the current directory, in the folders of the configs that were loaded
    and of `files`, and in the folders above each of them.

    Args:
        module_name: of a module that cannot be imported.
        files: whose code imports it.
    """
    relative = os.path.join(*module_name.split('.'))
    for folder in dict.fromkeys(_folders(files)):
        for candidate in (f'{relative}.py', os.path.join(relative, '__init__.py'), relative):
            found = folder / candidate
            if os.path.isfile(found) or (candidate == relative and _has_modules(found)):
                return _advice(found, folder, module_name)
    return ''


def _folders(files: Iterable[str]) -> Iterator[pathlib.Path]:
    configs = [
        getattr(module, '__file__', None) or ''
        for name, module in reversed(list(sys.modules.items()))  # The newest one first.
        if name.startswith(CONFIG_PREFIX)
    ]
    here = pathlib.Path.cwd()
    starts = [here, *(pathlib.Path(file).resolve().parent for file in (*files, *configs) if file)]
    for start in starts:
        yield start
        yield from start.parents


def _has_modules(folder: pathlib.Path) -> bool:
    """Whether a folder holds Python files, as one without `__init__.py` may."""
    try:
        return any(name.endswith('.py') for name in os.listdir(folder))
    except OSError:
        return False


def _advice(found: pathlib.Path, folder: pathlib.Path, module_name: str) -> str:
    """Returns what to do about a file that is the module `module_name` seen from a folder."""
    searched = [pathlib.Path(entry or '.').resolve() for entry in sys.path]
    if folder in searched:
        return _hidden(found, folder, module_name.partition('.')[0])
    dotted = _dotted_name(folder, module_name, searched)
    if dotted and '.' not in module_name and found.suffix:  # A file beside the one that imports it.
        return f'The name of {found} is {dotted}.'
    ways = ['start in that directory', f'add it to the path (PYTHONPATH={folder})']
    ways += [f'name the module {dotted}'] if dotted else []
    return (
        f'Python does not look for modules in {folder}, where {found.relative_to(folder)} is: '
        f'{", ".join(ways[:-1])} or {ways[-1]}.'
    )


def _dotted_name(
    folder: pathlib.Path, module_name: str, searched: Iterable[pathlib.Path]
) -> str | None:
    """Returns the name by which Python finds a module of a folder, or None if it does not."""
    for entry in searched:
        if folder.is_relative_to(entry):
            parts = folder.relative_to(entry).parts
            if all(part.isidentifier() for part in parts):
                return '.'.join((*parts, module_name))
    return None


def _hidden(found: pathlib.Path, folder: pathlib.Path, top: str) -> str:
    """Says what Python finds in place of a file that is where Python looks."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return ''
    if spec is None or spec.origin is None:
        return ''
    if spec.submodule_search_locations is None:  # A file `data.py` beside a folder `data`.
        return f'{spec.origin} hides {found}: rename one of the two.'
    return f'{spec.origin} hides {found}: add an empty file {folder / top / "__init__.py"}.'
