# SPDX-License-Identifier: Apache-2.0
"""Retention: which checkpoints are kept, and which one is the best."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest

from tests.checkpoint.examples import state
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.config.durations import Periodic

METRIC = 'eval/test/loss'
NAN = math.nan


def meta(value: float | None) -> dict[str, Any]:
    return {'metrics': {METRIC: value}, 'evaluated': ['test']}


def save_scores(
    tmp_path: pathlib.Path, scores: Mapping[int, float], **retention: Any
) -> Checkpoints:
    """Returns the checkpoints after a save of each step."""
    checkpoints = Checkpoints(tmp_path, Retention(**retention))
    for step, value in scores.items():
        checkpoints.save(step, state(), meta(value))
    checkpoints.close()
    return checkpoints


@pytest.mark.parametrize(('last', 'expected'), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_keep_last(tmp_path: pathlib.Path, last: int, expected: list[int]) -> None:
    """The newest are kept."""
    assert (
        save_scores(tmp_path, dict.fromkeys(range(1, 5), 0.0), keep_last=last).steps() == expected
    )


def test_every_nth_without_drift(tmp_path: pathlib.Path) -> None:
    """A period of 2.5 steps is due at 3, 5, 8: the first whole step after each multiple."""
    scores = dict.fromkeys(range(1, 10), 0.0)
    found = save_scores(tmp_path, scores, keep_last=1, keep_every=Periodic(Fraction(5, 2)))
    assert found.steps() == [3, 5, 8, 9]
    never = Retention(keep_last=1, keep_every=Periodic(None))
    assert never.steps_to_keep(range(5), lambda step: 0.0) == {4}


@pytest.mark.parametrize(('mode', 'best'), [('max', 20), ('min', 30)])
def test_the_best_and_the_newest_are_kept(tmp_path: pathlib.Path, mode: str, best: int) -> None:
    """The best one is kept, NaN is ignored."""
    scores = {10: 0.5, 20: 0.9, 30: 0.1, 40: NAN, 50: 0.4}
    found = save_scores(tmp_path, scores, keep_last=1, best_metric=METRIC, best_mode=mode)
    assert found.best() == best
    assert found.steps() == [best, 50]
    # Another process sees the same.
    again = Retention(best_metric=METRIC, best_mode=mode)
    assert Checkpoints(tmp_path, again).best() == best


def test_the_newest_is_kept_although_another_one_is_better(tmp_path: pathlib.Path) -> None:
    scores = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}
    assert save_scores(tmp_path, scores, keep_last=2, best_metric=METRIC).steps() == [1, 3, 4]


def test_a_nan_is_never_the_best(tmp_path: pathlib.Path) -> None:
    found = save_scores(tmp_path, dict.fromkeys((1, 2, 3), NAN), keep_last=1, best_metric=METRIC)
    assert found.best() is None
    assert found.steps() == [3]


def test_the_newest_of_equal_ones_is_the_best(tmp_path: pathlib.Path) -> None:
    found = save_scores(
        tmp_path, dict.fromkeys((1, 2, 3), 0.5) | {4: 0.1}, keep_last=1, best_metric=METRIC
    )
    assert found.steps() == [found.best(), 4] == [3, 4]


def test_another_mode_ranks_existing_checkpoints_again(tmp_path: pathlib.Path) -> None:
    save_scores(tmp_path, {1: 0.9, 2: 0.1, 3: 0.5}, keep_last=3, best_metric=METRIC)
    found = save_scores(tmp_path, {4: 0.6}, keep_last=1, best_metric=METRIC, best_mode='min')
    assert found.steps() == [2, 4]


def test_a_checkpoint_with_damaged_metadata_is_not_the_best(tmp_path: pathlib.Path) -> None:
    save_scores(tmp_path, {1: 0.9, 2: 0.1}, keep_last=9, best_metric=METRIC)
    (tmp_path / '1' / 'meta' / 'metadata').write_text('{"metrics": {')
    found = save_scores(tmp_path, {3: 0.05}, keep_last=1, best_metric=METRIC)
    assert found.best() == 2
    assert found.steps() == [2, 3]


@pytest.mark.parametrize(
    'stored',
    [{}, {'metrics': {METRIC: 0.5}}, {**meta(0.5), 'evaluated': ['other']}, meta(None), meta(NAN)],
)
def test_no_score_without_an_evaluation_at_that_step(stored: dict[str, Any]) -> None:
    assert Retention(best_metric=METRIC).score(stored) == -math.inf
