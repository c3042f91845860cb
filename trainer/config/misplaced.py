# SPDX-License-Identifier: Apache-2.0
"""Hints for a missing module whose file exists, but not where Python looks for it."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

# Prefix of the names under which config files are imported.
CONFIG_PREFIX = '_config_'


def hint(module_name: str, files: Iterable[str] = ()) -> str:
    """Returns a sentence on where the file of a missing module is and how to import it, or ''.

    The file is searched in the current directory, in the folders of the loaded configs and of
    `files`, and in all of their parents.

    Args:
        module_name: full name of the missing module.
        files: the files whose code imports it.
    """
    relative = os.path.join(*module_name.split('.'))
    for folder in dict.fromkeys(_folders(files)):
        for candidate in (f'{relative}.py', os.path.join(relative, '__init__.py'), relative):
            path = folder / candidate
            # `os.path.isfile` is False for a name that is too long, where pathlib would raise.
            if os.path.isfile(path) or (candidate == relative and _has_modules(path)):
                return _advice(path, folder, module_name)
    return ''


def _folders(files: Iterable[str]) -> Iterator[pathlib.Path]:
    """Yields the folders to search, the likeliest first."""
    configs = [
        getattr(module, '__file__', None) or ''
        for name, module in reversed(list(sys.modules.items()))  # The newest first.
        if name.startswith(CONFIG_PREFIX)
    ]
    current = pathlib.Path.cwd()
    starts = [
        current,
        *(pathlib.Path(file).resolve().parent for file in (*files, *configs) if file),
    ]
    for start in starts:
        yield start
        yield from start.parents


def _has_modules(folder: pathlib.Path) -> bool:
    """Whether a folder contains Python files; a package need not have an `__init__.py`."""
    try:
        return any(name.endswith('.py') for name in os.listdir(folder))
    except OSError:
        return False


def _advice(path: pathlib.Path, folder: pathlib.Path, module_name: str) -> str:
    """Returns how to import a file.

    Args:
        path: the file or folder of the module.
        folder: the folder that Python would have to search to find it as `module_name`.
        module_name: the name that was imported.
    """
    searched = [pathlib.Path(entry or '.').resolve() for entry in sys.path]
    # Python looks in this folder already, so another module of that name comes first.
    if folder in searched:
        return _hidden_module_text(path, folder, module_name.partition('.')[0])
    full_name = _full_name(folder, module_name, searched)
    if full_name and '.' not in module_name and path.suffix:  # A file next to the importing one.
        return f'The full name of {path} is {full_name}.'
    ways = ['start in that directory', f'add it to the path (PYTHONPATH={folder})']
    ways += [f'name the module {full_name}'] if full_name else []
    return (
        f'Python does not look for modules in {folder}, where {path.relative_to(folder)} is: '
        f'{", ".join(ways[:-1])} or {ways[-1]}.'
    )


def _full_name(
    folder: pathlib.Path, module_name: str, searched: Iterable[pathlib.Path]
) -> str | None:
    """Returns the name under which Python finds a module of a folder, None if it does not."""
    for entry in searched:
        if folder.is_relative_to(entry):
            parts = folder.relative_to(entry).parts
            # A folder such as 'my-project' cannot be part of a module's name.
            if all(part.isidentifier() for part in parts):
                return '.'.join((*parts, module_name))
    return None


def _hidden_module_text(path: pathlib.Path, folder: pathlib.Path, top: str) -> str:
    """Returns what Python finds in place of a file in a folder where it looks for modules."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return ''
    if spec is None or spec.origin is None:
        return ''
    if spec.submodule_search_locations is None:  # A file `data.py` next to a folder `data`.
        return f'{spec.origin} hides {path}: rename one of the two.'
    # Python prefers any package with an `__init__.py` to a folder without one.
    return f'{spec.origin} hides {path}: add an empty file {folder / top / "__init__.py"}.'
