# SPDX-License-Identifier: Apache-2.0
"""Builds checkpoint retention and early stopping, which depend on evaluation metrics."""

from __future__ import annotations

import dataclasses

from trainer.builders.early_stopping import EarlyStopping
from trainer.checkpoint.retention import Retention, better_mode
from trainer.config import suggest
from trainer.config.checks import check_positive
from trainer.config.durations import Clock
from trainer.config.errors import UserError
from trainer.config.sections import BestSection, EarlyStoppingSection, Sections

# Metrics of the tasks of this package, to suggest for a misspelled name.
_USUAL = ('loss', 'accuracy', 'mean_absolute_error')


def build_retention(sections: Sections, clock: Clock) -> Retention:
    """Returns the retention rule of `config.checkpoint`.

    Raises:
        UserError: for a metric that belongs to no evaluation, or whose mode is unknown.
    """
    given, path = sections.checkpoint, 'config.checkpoint'
    kept = Retention(
        keep_last=check_positive(given.keep_last, f'{path}.keep_last'),
        keep_every=clock.period(given.keep_every, path=f'{path}.keep_every'),
    )
    if given.best is None:
        return kept
    metric, mode = _metric_and_mode(given.best, f'{path}.best', sections)
    return dataclasses.replace(kept, best_metric=metric, best_mode=mode)


def build_early_stopping(sections: Sections) -> EarlyStopping | None:
    """Returns the early stopping rule, or None.

    Raises:
        UserError: for a negative number, for a metric that belongs to no evaluation, or whose mode
            is unknown.
    """
    given, path = sections.early_stopping, 'config.early_stopping'
    if given is None:
        return None
    for name in ('min_delta', 'patience'):
        # Not `< 0`, which is false for NaN.
        if not getattr(given, name) >= 0:
            raise UserError(f'{path}.{name}: expected at least 0, got {getattr(given, name)}')
    metric, mode = _metric_and_mode(given, path, sections)
    return EarlyStopping(
        metric=metric, mode=mode, min_delta=given.min_delta, patience=given.patience
    )


def _metric_and_mode(
    given: BestSection | EarlyStoppingSection, path: str, sections: Sections
) -> tuple[str, str]:
    """Returns the name of an evaluation metric, and whether 'min' or 'max' of it is better."""
    parts = given.metric.split('/')
    # Ensembles have names of four parts as well, such as 'eval/test/member_0/loss'.
    if len(parts) < 3 or parts[0] != 'eval' or parts[1] not in sections.evals:
        names = [f'eval/{name}/...' for name in sections.evals]
        near = suggest.nearest_name(given.metric, names, cutoff=0.0)
        raise UserError(
            f'{path}.metric: {given.metric!r} is not a metric of an evaluation'
            + (f'; expected {near}' if near else ', and this config has no evals')
        )
    mode = given.mode or better_mode(parts[-1])
    # The names of a task's metrics are unknown before it is traced, so a misspelled name is found
    # here only if its mode is unknown, too.
    if mode is None:
        near = suggest.nearest_name(parts[-1], _USUAL)
        if near:
            raise UserError(
                f'{path}.metric: no metric {parts[-1]!r}; did you mean {near!r}? (Otherwise set '
                f"{path}.mode to 'min' or 'max'.)"
            )
        raise UserError(
            f"{path}.mode is missing: set it to 'max' if larger values of {parts[-1]!r} are "
            "better, to 'min' if smaller ones are"
        )
    return given.metric, mode
