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

# Changes of these keys, and of keys below them, do not affect the trained state (except for
# rounding, with mesh, sharding and steps_per_call). All other changes make a different run.
_FREE = (
    'train_for', 'log', 'checkpoint', 'evals', 'hooks', 'mesh', 'steps_per_call', 'sharding',
    'profile', 'data.prefetch', 'early_stopping', 'data.loader.threads', 'data.loader.workers',
    'data.loader.ahead', 'data.loader.task_rows', 'capture', 'guard', 'watchdog',
)  # fmt: skip
# Of the optimizer and of its groups. The choice of parameters to evaluate does not affect training.
_EVAL_PARAMS = re.compile(r'optimizer\.(groups\.[^.]+\.)?eval_params\b.*')
# Far below the 255 bytes that file systems allow, and still readable.
_MAX_NAME = 100
# Characters that are replaced in the name of a directory. They include its separators: '-' between
# words, and ',' and '=' between overrides; '-' is allowed in values, for negative numbers.
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
    """Returns the default work directory, such as 'runs/mnist-optimizer.learning_rate=0.1'.

    The same command always has the same directory, so that it resumes. Its name consists of

    - the name of the config file, with its folder unless that is `configs/`: 'vision.mnist'
    - the argument of `get_config`, if there is one
    - the overrides that belong to the run's identity and change a value; their order does not
      matter, unless one changes what another has set
    - a hash, if the above is shortened or ambiguous.
    """
    relevant = [o for o in overrides if is_identity(o.path) and o.new != o.old]
    # Of several overrides of one path, the last one counts.
    by_path = sorted({o.path: o.text for o in relevant}.items())
    ordered = [(o.path, o.text) for o in relevant] if _does_order_matter(relevant) else by_path
    config = loaded.name if loaded.path is None else _config_name(loaded.path)
    words = [word for word in (config, loaded.arg) if word]
    fit_words = [_UNFIT.sub('_', word) for word in words]
    fit = [(_UNFIT.sub('_', path), _UNFIT_VALUE.sub('_', text)) for path, text in by_path]
    name = '-'.join(fit_words)
    if fit:
        name += '-' + ','.join(f'{path}={text}' for path, text in fit)
    if fit_words != words or fit != ordered or len(name) > _MAX_NAME:
        # Replaced or truncated characters must not give two runs the same directory.
        digest = hashlib.sha256(repr((config, loaded.arg, ordered)).encode()).hexdigest()[:8]
        name = f'{name[: _MAX_NAME - 9]}-{digest}'
    return f'runs/{name}'


def _config_name(path: pathlib.Path) -> str:
    """Returns 'mnist' for configs/mnist.py and bundled configs, 'a.b.mnist' for a/b/mnist.py."""
    folder = path.resolve().parent
    for root in (pathlib.Path.cwd(), bundled.FOLDER):
        if folder.is_relative_to(root):
            parts = folder.relative_to(root).parts
            return '.'.join([*(parts[1:] if parts[:1] == ('configs',) else parts), path.stem])
    # A folder elsewhere has no short name; its hash keeps files of the same name apart.
    return f'{path.stem}.{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}'


def _does_order_matter(overrides: Sequence[Override]) -> bool:
    """Whether one override changes, or merges with, a value that another one has set."""
    return any(
        _is_inside(a, b) or _is_inside(b, a) for a, b in itertools.combinations(overrides, 2)
    )


def _is_inside(inner: Override, outer: Override) -> bool:
    merges = inner.value_path == outer.value_path and isinstance(inner.new, Mapping)
    return merges or inner.value_path.startswith((f'{outer.value_path}.', f'{outer.value_path}['))
