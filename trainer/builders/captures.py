# SPDX-License-Identifier: Apache-2.0
"""Builds the captures of `config.capture`."""

from __future__ import annotations

import dataclasses

from trainer.config.checks import check_positive
from trainer.config.durations import Clock, Periodic
from trainer.config.errors import UserError
from trainer.config.sections import CaptureSection, Sections
from trainer.modules import patterns
from trainer.modules.recorder import ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """An entry of `config.capture`.

    Attributes:
        match: patterns for the whole path of a module, or of a value that it sows.
        every: when to capture.
        what: outputs, of 'summary', 'histogram' and 'file'.
        rows: number of examples of each array that are written to a file.
        keep: maximum number of files; the oldest are deleted.
    """

    match: tuple[str, ...]
    every: Periodic
    what: frozenset[str]
    rows: int
    keep: int

    def wants(self, path: str) -> bool:
        """Whether the value at this path is captured; '' is the model itself."""
        return patterns.matches(self.match, path or ROOT)


def build_captures(sections: Sections, clock: Clock) -> dict[str, Capture]:
    """Returns the captures of `config.capture` by name.

    Raises:
        UserError: for an invalid value, and for captures or `guard='warn'` of an ensemble.
    """
    # Both run the model outside of the step, for one set of variables.
    enabled = {'capture': bool(sections.capture), 'guard': sections.guard.non_finite == 'warn'}
    for key, is_enabled in enabled.items():
        if is_enabled and sections.ensemble is not None:
            raise UserError(f'config.{key}: not supported for ensembles; train one member')
    return {
        name: _capture(section, f'config.capture.{name}', sections, clock)
        for name, section in sections.capture.items()
    }


def _capture(given: CaptureSection, path: str, sections: Sections, clock: Clock) -> Capture:
    match = (given.match,) if isinstance(given.match, str) else given.match
    for pattern in match:
        patterns.compile_pattern(pattern, f'{path}.match')
    if 'histogram' in given.what and not sections.log.tensorboard:
        raise UserError(
            f"{path}.what: 'histogram' needs TensorBoard, but config.log.tensorboard is off"
        )
    return Capture(
        match=match,
        every=clock.period(given.every or sections.log.every, path=f'{path}.every'),
        what=frozenset(given.what),
        rows=check_positive(given.rows, f'{path}.rows'),
        keep=check_positive(given.keep, f'{path}.keep'),
    )
