# SPDX-License-Identifier: Apache-2.0
"""What makes two runs the same run, and the directory that follows from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from trainer.config.diff import Change
from trainer.config.loading import LoadedConfig
from trainer.config.overrides import Override

# Changes below these keys leave the trained state what it is (to the last bits, for mesh and
# steps_per_call). All others make another run.
_FREE = (
    'train_for', 'log', 'checkpoint', 'evals', 'hooks', 'mesh', 'steps_per_call', 'data.prefetch',
)  # fmt: skip
_MAX_NAME = 100


def is_identity(path: str) -> bool:
    """Whether a change at this path makes another run."""
    return not any(path == free or path.startswith((f'{free}.', f'{free}[')) for free in _FREE)


def identity_changes(changes: Sequence[Change]) -> list[Change]:
    """Returns the changes that make another run."""
    return [change for change in changes if is_identity(change.path)]


def default_workdir(loaded: LoadedConfig, overrides: Sequence[Override]) -> str:
    """Returns 'runs/mnist-optimizer.learning_rate=0.1': the same command, the same directory.

    Overrides that leave the run's identity alone do not show; the order of the others does not
    matter, and a long name ends in a hash.
    """
    last = {o.path: o.text for o in overrides if is_identity(o.path)}
    parts = [loaded.name, *([loaded.arg] if loaded.arg else [])]
    changed = ','.join(f'{path}={text}' for path, text in sorted(last.items()))
    full = '-'.join([*parts, *([changed] if changed else [])])
    name = re.sub(r'[^\w.=,+%-]+', '_', full)
    if name != full or len(name) > _MAX_NAME:
        # What was replaced or cut must not make two runs meet.
        digest = hashlib.sha256(full.encode()).hexdigest()[:8]
        name = f'{name[: _MAX_NAME - 9]}-{digest}'
    return f'runs/{name}'
