# SPDX-License-Identifier: Apache-2.0
"""The checkpoint guide on today's Orbax and Flax: what the same calls do."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import errors
from flax.training import checkpoints, orbax_utils

from tests.checkpoint.examples import abstract, state
from trainer.checkpoint.manager import Checkpoints, Retention

TREE = {'a': np.arange(4.0), 'b': {'c': np.ones((2, 3))}}


def manager(directory: pathlib.Path, **options: Any) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))


def saved(found: ocp.CheckpointManager, steps: range, **options: Any) -> list[int]:
    """Returns the steps that are kept."""
    for step in steps:
        found.save(step, args=ocp.args.StandardSave(TREE), **options)
    found.wait_until_finished()
    kept = list(found.all_steps())
    found.close()
    return kept


def test_small_arrays_are_aggregated(tmp_path: pathlib.Path) -> None:
    """H2: the arguments that the guide passes are still taken; a whole tree comes back."""
    checkpointer = ocp.PyTreeCheckpointer()
    args = orbax_utils.save_args_from_target(TREE)
    checkpointer.save(tmp_path / 'tree', TREE, save_args=args)
    found = checkpointer.restore(tmp_path / 'tree')
    jax.tree.map(np.testing.assert_array_equal, found, TREE)


def test_the_last_are_kept(tmp_path: pathlib.Path) -> None:
    """H3: two of five, by Orbax's manager."""
    assert saved(manager(tmp_path, max_to_keep=2), range(5)) == [3, 4]


def test_every_second_is_kept(tmp_path: pathlib.Path) -> None:
    """H4: beside the last three; a prefix is part of the directory's name."""
    options = {'max_to_keep': 3, 'keep_period': 2, 'step_prefix': 'test'}
    assert saved(manager(tmp_path, **options), range(5)) == [0, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} >= {'test_0', 'test_4'}


def test_by_interval_and_by_metric(tmp_path: pathlib.Path) -> None:
    """H5: an interval leaves saves out; the best stays although it is old."""
    assert saved(manager(tmp_path / 'every', save_interval_steps=2), range(5)) == [0, 2, 4]
    best = manager(
        tmp_path / 'best', max_to_keep=1, best_fn=lambda metrics: metrics['loss'], best_mode='min'
    )
    for step, loss in enumerate((3.0, 1.0, 2.0)):
        best.save(step, args=ocp.args.StandardSave(TREE), metrics={'loss': loss})
    best.wait_until_finished()
    assert best.best_step() == 1 and 1 in best.all_steps()
    best.close()


def test_the_same_step_again(tmp_path: pathlib.Path) -> None:
    """H11: Flax's legacy function refuses it, Orbax's manager passes it by, or refuses by force."""
    legacy = checkpoints.save_checkpoint(tmp_path / 'old', TREE, step=2)
    assert legacy.endswith('checkpoint_2')
    with pytest.raises((errors.InvalidCheckpointError, ValueError)):
        checkpoints.save_checkpoint(tmp_path / 'old', TREE, step=2)
    theirs = manager(tmp_path / 'new')
    theirs.save(3, args=ocp.args.StandardSave(TREE))
    theirs.wait_until_finished()
    for step in (3, 2):
        assert not theirs.save(step, args=ocp.args.StandardSave(TREE))
    with pytest.raises(ocp.checkpoint_manager.StepAlreadyExistsError):
        theirs.save(3, args=ocp.args.StandardSave(TREE), force=True)
    theirs.close()


def test_metadata_lies_beside(tmp_path: pathlib.Path) -> None:
    """H23: what a run knows of a step is in its checkpoint, text and lists among it."""
    ours = Checkpoints(tmp_path, Retention())
    known = {'config': {'model': {'target': 'a:B', 'features': [64, 10]}}, 'note': 'text'}
    ours.save(7, state(1), known)
    ours.close()
    found = Checkpoints(tmp_path, Retention())
    assert found.meta(7)['config'] == known['config']
    assert found.meta(7)['note'] == 'text'
    jax.tree.map(np.testing.assert_array_equal, found.restore(7, abstract(state(1))), state(1))
