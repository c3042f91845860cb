# SPDX-License-Identifier: Apache-2.0
"""The identity of a run (the config keys that define it), and its default work directory."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence

from trainer.config import bundled
from trainer.config.diff import Change
from trainer.config.loading import LoadedConfig
from trainer.config.overrides import Override

# Changes below these keys do not affect the trained state (except for rounding, with mesh,
# sharding and steps_per_call). All other changes make a different run.
_FREE = (
    'train_for', 'log', 'checkpoint', 'evals', 'hooks', 'mesh', 'steps_per_call', 'sharding',
    'profile', 'data.prefetch', 'early_stopping', 'data.loader.threads', 'data.loader.workers',
    'data.loader.ahead', 'data.loader.task_rows', 'capture', 'guard',
)  # fmt: skip
# In groups too. The parameters that are evaluated do not affect training.
_EVAL_PARAMS = re.compile(r'optimizer\.(groups\.[^.]+\.)?eval_params\b.*')
_MAX_NAME = 100
# What a name cannot hold, its separators among them: '-' between words, ',' and '=' of overrides.
_UNFIT = re.compile(r'[^\w.+%]+')
_UNFIT_VALUE = re.compile(r'[^\w.+%-]+')


def is_identity(path: str) -> bool:
    """Whether a change at this key path makes a different run."""
    if _EVAL_PARAMS.fullmatch(path):
        return False
    return not any(path == free or path.startswith((f'{free}.', f'{free}[')) for free in _FREE)


def identity_changes(changes: Sequence[Change]) -> list[Change]:
    """Returns the changes that make a different run."""
    return [change for change in changes if is_identity(change.path)]


def default_workdir(loaded: LoadedConfig, overrides: Sequence[Override]) -> str:
    """Returns 'runs/mnist-optimizer.learning_rate=0.1': the same command, the same directory.

    A file in another folder than `configs/` brings its folder along: 'runs/vision.mnist'. Overrides
    that leave the run's identity alone, or a value what it is, do not show. The order of the others
    does not matter, unless one changes what another has set. A name that does not say all ends in a
    hash.
    """
    mine = [o for o in overrides if is_identity(o.path) and o.new != o.old]
    last = sorted({o.path: o.text for o in mine}.items())
    given = [(o.path, o.text) for o in mine] if _does_order_matter(mine) else last
    config = _config_name(loaded.path)
    words = [word for word in (config, loaded.arg) if word]
    fit_words = [_UNFIT.sub('_', word) for word in words]
    fit = [(_UNFIT.sub('_', path), _UNFIT_VALUE.sub('_', text)) for path, text in last]
    name = '-'.join(fit_words)
    if fit:
        name += '-' + ','.join(f'{path}={text}' for path, text in fit)
    if fit_words != words or fit != given or len(name) > _MAX_NAME:
        # What was replaced or cut must not make two runs meet.
        digest = hashlib.sha256(repr((config, loaded.arg, given)).encode()).hexdigest()[:8]
        name = f'{name[: _MAX_NAME - 9]}-{digest}'
    return f'runs/{name}'


def _config_name(path: pathlib.Path) -> str:
    """Returns 'mnist' for configs/mnist.py, here or bundled, and 'a.b.mnist' for a/b/mnist.py."""
    folder = path.resolve().parent
    for root in (pathlib.Path.cwd(), bundled.FOLDER):
        if folder.is_relative_to(root):
            parts = folder.relative_to(root).parts
            return '.'.join([*(parts[1:] if parts[:1] == ('configs',) else parts), path.stem])
    return f'{path.stem}.{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}'


def _does_order_matter(overrides: Sequence[Override]) -> bool:
    """Whether one changes, or merges into, what another has set."""
    return any(
        _is_inside(a, b) or _is_inside(b, a) for a, b in itertools.combinations(overrides, 2)
    )


def _is_inside(inner: Override, outer: Override) -> bool:
    merges = inner.value_path == outer.value_path and isinstance(inner.new, Mapping)
    return merges or inner.value_path.startswith((f'{outer.value_path}.', f'{outer.value_path}['))
