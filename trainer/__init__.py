# SPDX-License-Identifier: Apache-2.0
"""Train Flax models from `ml_collections` configs. Importing this package imports no JAX.

The names below are imported on first use; their types are declared in `__init__.pyi`.
"""

import importlib
from typing import Any

_HOMES = {
    'Experiment': 'trainer.experiment',
    'TaskOutput': 'trainer.tasks',
    'Trainer': 'trainer.trainer',
    'build': 'trainer.experiment',
    'load_and_build': 'trainer.experiment',
    'pad_shard_unpad': 'trainer.evaluate.pad',
    'precompute': 'trainer.modes.features',
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
