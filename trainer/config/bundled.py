# SPDX-License-Identifier: Apache-2.0
"""The location and names of the bundled models, data and configs.

They have one name, in a checkout and in an installed wheel: `trainer.models.cnn:CNN`,
`trainer.data.mnist:MNIST`, `trainer.configs.mnist`, and `--config=mnist` or
`--config=configs/mnist.py`. A name that does not begin with `trainer.` belongs to the user or to a
library. So packages `models`, `data` and `configs` of the user's own neither hide the bundled ones
nor are hidden by them, and no class exists twice, under two names.

In a checkout the files are in the folders `models/`, `data/` and `configs/` at the top, for people
to read. The wheel has them in `trainer/models/` and so on (`force-include` in pyproject.toml). The
packages `trainer.models`, `trainer.data` and `trainer.configs` consist of one line that says which
of the two it is.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]

# The folder whose models/, data/ and configs/ hold the files. Only a wheel has them in trainer/.
FOLDER = _PACKAGE if (_PACKAGE / 'configs' / 'mnist.py').is_file() else _PACKAGE.parent

# Packages of ours that are called `trainer.<name>`.
PACKAGES = ('models', 'data', 'configs')


def full_name(module_name: str) -> str | None:
    """Returns 'trainer.models.cnn' for 'models.cnn', unless that is a module of the user's own.

    In a checkout Python may find the file by either name. Under two names it would be loaded
    twice, and an object of one class would be no instance of the other.
    """
    package, _, rest = module_name.partition('.')
    # The package itself is never ours by this name: `data:Mine` is a `data.py` of the user's.
    if package not in PACKAGES or not rest or not _is_module(FOLDER / package, rest):
        return None
    found = _find_file(package, rest.partition('.')[0])
    if found is None or found.is_relative_to(FOLDER / package):
        return f'trainer.{module_name}'
    return None


def _is_module(folder: pathlib.Path, rest: str) -> bool:
    path = folder.joinpath(*rest.split('.'))
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def _find_file(package: str, name: str) -> pathlib.Path | None:
    """Returns the file of a module of a top-level package, as Python finds it, without a load."""
    if package in sys.modules:
        folders = getattr(sys.modules[package], '__path__', ())
    else:
        top = importlib.util.find_spec(package)
        folders = (top.submodule_search_locations if top else None) or ()
    spec = importlib.machinery.PathFinder.find_spec(f'{package}.{name}', list(folders))
    return pathlib.Path(spec.origin).resolve() if spec and spec.origin else None
