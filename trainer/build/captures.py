# SPDX-License-Identifier: Apache-2.0
"""From `config.capture` to captures."""

from __future__ import annotations


from trainer.config import patterns
from trainer.config.durations import Clock
from trainer.config.errors import UserError
from trainer.config.sections import CaptureSection, Sections
from trainer.build.data import positive
from trainer.inspect.capture import Capture


def captures(sections: Sections, clock: Clock) -> dict[str, Capture]:
    """Returns what `config.capture` asks for, by name.

    Raises:
        UserError: for a value that does not fit; and if an ensemble shall be looked into.
    """
    asked = {'capture': bool(sections.capture), 'guard': sections.guard.non_finite == 'warn'}
    for key, given in asked.items():
        if given and sections.ensemble is not None:
            raise UserError(f'config.{key}: an ensemble cannot be looked into; train one member')
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
