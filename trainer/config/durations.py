# SPDX-License-Identifier: Apache-2.0
"""Durations: '10 epochs', '2000 steps', '60000 examples', '5%', 'never'; exact, without drift."""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from trainer.config.errors import UserError, short_repr

_UNITS = {
    'step': 'steps', 'steps': 'steps', 'epoch': 'epochs', 'epochs': 'epochs',
    'example': 'examples', 'examples': 'examples', '%': 'percent',
}  # fmt: skip
_PATTERN = re.compile(r'\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([a-z]+|%)\s*')


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training.

    Attributes:
        value: exact number of units; 0 for 'never'.
        unit: 'steps', 'epochs', 'examples', 'percent' (of the run) or 'never'.
    """

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: object, path: str = '', *, zero: bool = False) -> Duration:
        """Returns the duration that `text` names.

        Args:
            text: what is given.
            path: where, for messages.
            zero: whether '0%' is one too, as of a warm-up that is left out.

        Raises:
            UserError: if it names none, or one that is not positive.
        """
        if isinstance(text, Duration):
            return text
        if text == 'never':
            return cls(Fraction(0), 'never')
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[2] not in _UNITS:
            raise UserError(
                f'{path or "a duration"}: {short_repr(text)} is not a duration; write a number and '
                "a unit, such as '10 epochs', '2000 steps', '60000 examples', '5%' or 'never'"
            )
        # As a float first: the digits of '1e999999999' fill the memory.
        number = float(match[1])
        if not (0 < number < math.inf or (zero and number == 0)):
            raise UserError(
                f'{path or "a duration"}: {short_repr(text)} must be positive and finite'
                + ('' if zero else ", or 'never'")
            )
        return cls(Fraction(match[1]), _UNITS[match[2]])

    def __str__(self) -> str:
        if self.unit == 'never':
            return 'never'
        whole = self.value.denominator == 1
        number = str(self.value.numerator) if whole else repr(float(self.value))
        return f'{number}%' if self.unit == 'percent' else f'{number} {self.unit}'


def is_duration(value: object) -> bool:
    """Whether a value is a string that is wholly a duration."""
    if not isinstance(value, str):
        return False
    match = _PATTERN.fullmatch(value)
    return value == 'never' or (match is not None and match[2] in _UNITS)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run has consumed by each step, in batches of its current size.

    Attributes:
        marks: (step, batches), ascending from (0, 0); linear in between, and one batch per step
            after the last. Two marks at one step are a jump: the end of that step has the lower.
    """

    marks: tuple[tuple[Fraction, Fraction], ...]

    def batches_at(self, step: int) -> Fraction:
        """Returns the batches by the end of a step."""
        return self._line(Fraction(step), 0, 1)

    def step_at(self, batches: Fraction) -> Fraction:
        """Returns the (possibly fractional) step at which this many batches are consumed."""
        return self._line(batches, 1, 0)

    @property
    def offset(self) -> Fraction:
        """Offset that converts a step after the last mark to its batches."""
        step, batches = self.marks[-1]
        return batches - step

    def _line(self, x: Fraction, of: int, to: int) -> Fraction:
        last = max(bisect.bisect_left([mark[of] for mark in self.marks], x) - 1, 0)
        begin = self.marks[last]
        slope = Fraction(1)
        if last + 1 < len(self.marks):
            end = self.marks[last + 1]
            slope = (end[to] - begin[to]) / (end[of] - begin[of])
        return begin[to] + (x - begin[of]) * slope


@dataclasses.dataclass(frozen=True)
class Periodic:
    """An event that fires whenever the run crosses a multiple of its period.

    Attributes:
        period_steps: exact period, perhaps a fraction of a step; None never fires.
        progress: for a run whose batch size has changed, what is counted instead of its steps.
    """

    period_steps: Fraction | None
    progress: Progress | None = None

    def is_due(self, step: int) -> bool:
        """Whether step number `step` (1 is the first) crosses a multiple of the period."""
        period = self.period_steps
        return (
            period is not None
            and self._position_at(step) // period > self._position_at(step - 1) // period
        )

    def next_due(self, step: int) -> int | None:
        """Returns the first due step after `step`, or None."""
        period = self.period_steps
        if period is None:
            return None
        then = (self._position_at(step) // period + 1) * period
        if self.progress is None:
            return max(step + 1, math.ceil(then))
        # A change of batch size may leave out the rest of an epoch, and with it the multiple.
        following = max(step + 1, math.ceil(self.progress.step_at(then)))
        while not self.is_due(following):
            following += 1
        return following

    def _position_at(self, step: int) -> Fraction | int:
        return step if self.progress is None else self.progress.batches_at(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Turns durations into steps.

    If a run's batch size has changed, steps count as steps, and everything else as examples.

    Attributes:
        batch_size: rows of a global batch.
        steps_per_epoch: exact; None for a source without length.
        total_steps: length of the run; None while that is being worked out.
        progress: of a run whose batch size has changed; otherwise None.
    """

    batch_size: int
    steps_per_epoch: Fraction | None
    total_steps: int | None = None
    progress: Progress | None = None

    def exact_steps(self, duration: Duration, *, path: str) -> Fraction:
        """Returns the exact number of steps of the current batch size.

        Raises:
            UserError: for epochs of a source without length, a percentage of an unknown total, or
                'never'.
        """
        if duration.unit == 'steps':
            return duration.value
        if duration.unit == 'examples':
            return duration.value / self.batch_size
        if duration.unit == 'epochs':
            if self.steps_per_epoch is None:
                raise UserError(f'{path}: {duration}: the source has no length; count in steps')
            return duration.value * self.steps_per_epoch
        if duration.unit == 'percent' and self.total_steps is not None:
            total = (
                self.total_steps
                if self.progress is None
                else self.progress.batches_at(self.total_steps)
            )
            return duration.value * total / 100
        raise UserError(
            f"{path}: '{duration}' is not a length of time here; count in steps or epochs"
        )

    def batches(self, step: int) -> Fraction:
        """Returns what the run has consumed by a step, in batches of the current size."""
        return Fraction(step) if self.progress is None else self.progress.batches_at(step)

    def steps(self, duration: Duration, *, path: str) -> int:
        """Returns the number of steps of the current size; a fraction of a step counts as one."""
        return math.ceil(self.exact_steps(duration, path=path))

    def step_after(self, duration: Duration, *, path: str) -> int:
        """Returns the step by which a duration from the start of the run has passed."""
        steps = self.exact_steps(duration, path=path)
        if self.progress is not None and duration.unit != 'steps':
            steps = self.progress.step_at(steps)
        return math.ceil(steps)

    def period(self, duration: Duration, *, path: str) -> Periodic:
        """Returns the periodic event of that period."""
        if duration.unit == 'never':
            return Periodic(None)
        counted = None if duration.unit == 'steps' else self.progress
        return Periodic(self.exact_steps(duration, path=path), counted)


def resolve(node: Any, clock: Clock, path: str) -> tuple[Any, dict[str, int]]:
    """Replaces every string that is wholly a duration by its steps, dict keys included.

    Returns:
        The new node, and the steps of each replaced string by its path.
    """
    found: dict[str, int] = {}

    def steps(value: str, where: str) -> int:
        found[where] = clock.steps(Duration.parse(value, where, zero=True), path=where)
        return found[where]

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            walked: dict[Any, Any] = {}
            for key, item in value.items():
                step = steps(key, f'{where}.{key}') if is_duration(key) else key
                if step in walked:
                    same = next(k for k in value if found.get(f'{where}.{k}', k) == step)
                    raise UserError(
                        f'{where}: {same!r} and {key!r} are both step {step}. Leave one of them '
                        'out, or make the run longer (config.train_for)'
                    )
                walked[step] = walk(item, f'{where}.{key}')
            return walked
        if isinstance(value, (tuple, list)):
            return type(value)(walk(v, f'{where}[{i}]') for i, v in enumerate(value))
        return steps(value, where) if is_duration(value) and value != 'never' else value

    return walk(node, path), found
