# SPDX-License-Identifier: Apache-2.0
"""The location and names of the bundled models, data and configs.

Their names are the same in a checkout and in an installed wheel: `trainer.models.cnn:CNN`,
`trainer.data.mnist:MNIST`, `trainer.configs.mnist`, and `--config=mnist` or
`--config=configs/mnist.py`. A name that does not begin with `trainer.` belongs to the user or to a
library. So a user's own packages `models`, `data` and `configs` do not conflict with the bundled
ones, and no class exists twice, under two names.

In a checkout the files are in the top-level folders `models/`, `data/` and `configs/`, where they
are easy to find. The wheel has them in `trainer/models/` and so on (`force-include` in
pyproject.toml). The packages `trainer.models`, `trainer.data` and `trainer.configs` set their
`__path__` to one or the other.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]

# The folder that contains models/, data/ and configs/ with their files. Only in a wheel that is
# trainer/: in a checkout, its folders of these names contain only an `__init__.py`.
FOLDER = _PACKAGE if (_PACKAGE / 'configs' / 'mnist.py').is_file() else _PACKAGE.parent

# Bundled packages, which are imported as `trainer.<name>`.
PACKAGES = ('models', 'data', 'configs')


def full_name(module_name: str) -> str | None:
    """Returns 'trainer.models.cnn' for 'models.cnn', None if that is the user's own module.

    In a checkout Python may find the file by either name. Imported under both names, each of its
    classes would exist twice, and `isinstance` would fail between the two.
    """
    package, _, rest = module_name.partition('.')
    # The package itself is never ours by this name: `data:Mine` is a `data.py` of the user's.
    if package not in PACKAGES or not rest or not _is_module(FOLDER / package, rest):
        return None
    # The user's own `models` may contain a module of the same name, which then counts.
    file = _find_file(package, rest.partition('.')[0])
    if file is None or file.is_relative_to(FOLDER / package):
        return f'trainer.{module_name}'
    return None


def _is_module(folder: pathlib.Path, rest: str) -> bool:
    path = folder.joinpath(*rest.split('.'))
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def _find_file(package: str, name: str) -> pathlib.Path | None:
    """Returns the file from which Python would import a module of a top-level package."""
    # A package that is imported already may have changed its own `__path__`.
    if package in sys.modules:
        folders = getattr(sys.modules[package], '__path__', ())
    else:
        top = importlib.util.find_spec(package)
        folders = (top.submodule_search_locations if top else None) or ()
    spec = importlib.machinery.PathFinder.find_spec(f'{package}.{name}', list(folders))
    return pathlib.Path(spec.origin).resolve() if spec and spec.origin else None
