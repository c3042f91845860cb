# SPDX-License-Identifier: Apache-2.0
"""From `config.capture` to captures."""

from __future__ import annotations

import dataclasses

from trainer.config import patterns
from trainer.config.checks import positive
from trainer.config.durations import Clock, Periodic
from trainer.config.errors import UserError
from trainer.config.sections import CaptureSection, Sections
from trainer.modules.recorder import ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """An entry of `config.capture`.

    Attributes:
        match: patterns for the whole path of a module, or of what one has sown.
        every: when.
        what: of 'summary', 'histogram' and 'file'.
        rows: how many rows of each array go into a file.
        keep: how many files there are at most; the oldest are removed.
    """

    match: tuple[str, ...]
    every: Periodic
    what: frozenset[str]
    rows: int
    keep: int

    def wants(self, path: str) -> bool:
        """Whether it captures what has this path ('' is the model)."""
        return patterns.matches(self.match, path or ROOT)


def build_captures(sections: Sections, clock: Clock) -> dict[str, Capture]:
    """Returns what `config.capture` asks for, by name.

    Raises:
        UserError: for a value that does not fit; and if an ensemble shall be looked into.
    """
    asked = {'capture': bool(sections.capture), 'guard': sections.guard.non_finite == 'warn'}
    for key, given in asked.items():
        if given and sections.ensemble is not None:
            raise UserError(f'config.{key}: not supported for ensembles; train one member')
    return {
        name: _capture(section, f'config.capture.{name}', sections, clock)
        for name, section in sections.capture.items()
    }


def _capture(given: CaptureSection, path: str, sections: Sections, clock: Clock) -> Capture:
    match = (given.match,) if isinstance(given.match, str) else given.match
    for pattern in match:
        patterns.compiled(pattern, f'{path}.match')
    if 'histogram' in given.what and not sections.log.tensorboard:
        raise UserError(
            f"{path}.what: a 'histogram' goes to TensorBoard, and config.log.tensorboard is off"
        )
    return Capture(
        match=match,
        every=clock.period(given.every or sections.log.every, path=f'{path}.every'),
        what=frozenset(given.what),
        rows=positive(given.rows, f'{path}.rows'),
        keep=positive(given.keep, f'{path}.keep'),
    )
