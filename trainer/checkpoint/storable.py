# SPDX-License-Identifier: Apache-2.0
"""Checks before the first step that the state of a run can be saved.

It saves one small array with Orbax for each dtype and each unusual name, because saving all leaves
of a large model would take seconds.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer.checkpoint import empty
from trainer.checkpoint.empty import Names
from trainer.checkpoint.errors import SaveError, first_line
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.config.errors import UserError, indented_list
from trainer.modules.model_view import path_names

_PLAIN = ('x',)


class _Trial(NamedTuple):
    """An array of one element to save, with a key path and a dtype."""

    names: Names
    dtype: Any


_CONTROL = _Trial(_PLAIN, np.dtype('float32'))
# Cache of this process: most runs have the same dtypes and names.
_accepted: set[_Trial] = set()


def check_storable(abstract: Any) -> None:
    """Checks that a state can be saved and restored.

    With several processes only the names are checked: all of them must take part in a save.

    Args:
        abstract: the state, or its abstract shapes.

    Raises:
        UserError: naming the leaves that cannot be saved.
    """
    leaves = {
        path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    lines = _duplicate_names(leaves)
    if not lines and jax.process_count() == 1:
        lines = _check_leaves(leaves)
    if lines:
        raise UserError(
            f'cannot save the state of this run in a checkpoint:\n{indented_list(lines)}\n'
            'Change the model or optimizer that creates these arrays. Nothing was trained.'
        )


def _duplicate_names(leaves: Iterable[Names]) -> list[str]:
    """Returns a line for each pair of leaves with the same Orbax name: 'a.b' and 'a', 'b'.

    Orbax would silently keep only one of them.
    """
    seen: dict[str, Names] = {}
    lines = []
    for names in leaves:
        other = seen.setdefault('.'.join(names), names)
        if other != names:
            lines.append(f'{list(other)} and {list(names)}: both map to {".".join(names)!r}')
    return lines


def _check_leaves(leaves: dict[Names, Any]) -> list[str]:
    leaf_of: dict[_Trial, Names] = {}
    for names, leaf in leaves.items():
        # For a typed key its data is stored; an empty array is not stored.
        if not empty.is_key(leaf) and not empty.is_empty(leaf):
            leaf_of.setdefault(_Trial(_PLAIN, np.dtype(leaf.dtype)), names)
    for names in _unusual_names(leaves):
        leaf_of[_Trial(names, np.dtype('float32'))] = names
    new = [trial for trial in leaf_of if trial not in _accepted]
    # All at once, and one by one only after an error, to find the leaf: each save takes a while.
    if not new or _try_save(new) is None:
        _accepted.update(new)
        return []
    if _try_save([_CONTROL]) is not None:
        return []  # The temporary directory is not writable, which is not the state's fault.
    errors = {trial: _try_save([trial]) for trial in new}
    return [
        f'{"/".join(leaf_of[trial])} ({trial.dtype}): {error}'
        for trial, error in errors.items()
        if error is not None
    ]


def _unusual_names(leaves: Iterable[Names]) -> list[Names]:
    """Returns leaves that together cover all unusual characters and the longest name."""
    unusual: list[Names] = []
    seen: set[str] = set()
    for names in leaves:
        marks = set(re.findall(r'\W', ''.join(names))) | {'' for name in names if not name}
        if not marks <= seen:
            seen |= marks
            unusual.append(names)
    longest = max(leaves, key=lambda names: max(map(len, names), default=0), default=())
    # File systems allow about 255 bytes in the name of a file.
    return [*unusual, longest] if max(map(len, longest), default=0) > 200 else unusual


def _try_save(trials: list[_Trial]) -> str | None:
    """Returns the error, if any, of saving and restoring arrays of these names and dtypes."""
    tree: dict[str, Any] = {}
    for number, trial in enumerate(trials):
        parent = tree.setdefault(str(number), {})
        for name in trial.names[:-1]:
            parent = parent.setdefault(name, {})
        parent[trial.names[-1] if trial.names else 'x'] = np.ones(1, trial.dtype)
    state = jax.device_put(tree)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    failed_before = SaveError.occurred
    try:
        # Threads of a failed save may still write to the directory while it is being removed.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            checkpoints = Checkpoints(directory, Retention())
            checkpoints.save(0, state, {})
            checkpoints.close()
            checkpoints.restore(0, shapes)
    except SaveError as error:
        return first_line(error.__cause__ or error)
    except Exception as error:
        return first_line(error)
    finally:
        SaveError.occurred = failed_before  # This was not a save of the run.
    return None
