# SPDX-License-Identifier: Apache-2.0
"""Durations such as '10 epochs', '2000 steps', '60000 examples', '5%' and 'never'.

They are exact fractions: an event of every half epoch does not drift, however long the run is.
"""

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
        """Returns the duration that a text describes.

        Args:
            text: the text, such as '10 epochs'; a Duration is returned as it is.
            path: key path of the text, for messages.
            zero: whether a length of zero is allowed, such as '0%' for no warmup.

        Raises:
            UserError: if the text is not a duration, or not positive.
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
        # A float first, because Fraction('1e999999999') would fill the memory with its digits.
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
        is_whole = self.value.denominator == 1
        number = str(self.value.numerator) if is_whole else repr(float(self.value))
        return f'{number}%' if self.unit == 'percent' else f'{number} {self.unit}'


def is_duration(value: object) -> bool:
    """Whether a value is a string that consists of a duration."""
    if not isinstance(value, str):
        return False
    match = _PATTERN.fullmatch(value)
    return value == 'never' or (match is not None and match[2] in _UNITS)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The number of batches of its current size that a run has consumed by each step.

    Attributes:
        marks: (step, batches) pairs, ascending from (0, 0). The function is linear between them,
            and adds one batch per step after the last. Two marks at the same step are a jump; the
            end of that step has the lower value.
    """

    marks: tuple[tuple[Fraction, Fraction], ...]

    def batches_at(self, step: int) -> Fraction:
        """Returns the number of batches that are consumed by the end of a step."""
        return self._interpolate(Fraction(step), 0, 1)

    def step_at(self, batches: Fraction) -> Fraction:
        """Returns the step, perhaps a fraction, by which a number of batches is consumed."""
        return self._interpolate(batches, 1, 0)

    @property
    def offset(self) -> Fraction:
        """Number to add to a step after the last mark to get its batches."""
        step, batches = self.marks[-1]
        return batches - step

    def _interpolate(self, x: Fraction, source: int, target: int) -> Fraction:
        """Returns column `target` of the marks where column `source` is `x`."""
        # At a jump, `bisect_left` finds the segment before it, which ends in the lower value.
        last = max(bisect.bisect_left([mark[source] for mark in self.marks], x) - 1, 0)
        begin = self.marks[last]
        slope = Fraction(1)
        if last + 1 < len(self.marks):
            end = self.marks[last + 1]
            slope = (end[target] - begin[target]) / (end[source] - begin[source])
        return begin[target] + (x - begin[source]) * slope


@dataclasses.dataclass(frozen=True)
class Periodic:
    """An event that is due at each step that reaches or crosses a multiple of its period.

    Attributes:
        period_steps: exact period, perhaps a fraction of a step; None for an event that is never
            due.
        progress: for a run whose batch size has changed, the batches to count instead of steps.
    """

    period_steps: Fraction | None
    progress: Progress | None = None

    def is_due(self, step: int) -> bool:
        """Whether the event is due at a step; 1 is the first step of a run."""
        period = self.period_steps
        # From multiples, not from the last event: rounding each period would add up.
        return (
            period is not None
            and self._position_at(step) // period > self._position_at(step - 1) // period
        )

    def next_due(self, step: int) -> int | None:
        """Returns the first step after `step` at which the event is due, None if there is none."""
        period = self.period_steps
        if period is None:
            return None
        multiple = (self._position_at(step) // period + 1) * period
        if self.progress is None:
            # A period below one step has several multiples within it; the next step has the next.
            return max(step + 1, math.ceil(multiple))
        # A change of batch size may skip the rest of an epoch, and the multiple with it.
        next_step = max(step + 1, math.ceil(self.progress.step_at(multiple)))
        while not self.is_due(next_step):
            next_step += 1
        return next_step

    def _position_at(self, step: int) -> Fraction | int:
        return step if self.progress is None else self.progress.batches_at(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Converts durations to steps.

    After a change of a run's batch size, durations in steps count steps, and all others count
    examples.

    Attributes:
        batch_size: examples of a global batch.
        steps_per_epoch: exact number; None for a source without length.
        total_steps: length of the run; None while it is being computed.
        progress: progress of a run whose batch size has changed; otherwise None.
    """

    batch_size: int
    steps_per_epoch: Fraction | None
    total_steps: int | None = None
    progress: Progress | None = None

    def exact_steps(self, duration: Duration, *, path: str) -> Fraction:
        """Returns the exact length of a duration in steps of the current batch size.

        Raises:
            UserError: for epochs of a source without length, a percentage while the length of the
                run is unknown, or 'never'.
        """
        if duration.unit == 'steps':
            return duration.value
        if duration.unit == 'examples':
            return duration.value / self.batch_size
        if duration.unit == 'epochs':
            if self.steps_per_epoch is None:
                raise UserError(f'{path}: {duration}: the source has no length; use steps')
            return duration.value * self.steps_per_epoch
        if duration.unit == 'percent' and self.total_steps is not None:
            total = (
                self.total_steps
                if self.progress is None
                else self.progress.batches_at(self.total_steps)
            )
            return duration.value * total / 100
        raise UserError(
            f"{path}: '{duration}' cannot be used here; write a number of steps or epochs"
        )

    def batches(self, step: int) -> Fraction:
        """Returns the batches of the current size that the run has consumed by a step."""
        return Fraction(step) if self.progress is None else self.progress.batches_at(step)

    def steps(self, duration: Duration, *, path: str) -> int:
        """Returns the length of a duration in steps of the current batch size, rounded up."""
        return math.ceil(self.exact_steps(duration, path=path))

    def step_after(self, duration: Duration, *, path: str) -> int:
        """Returns the step by which a duration has passed since the start of the run."""
        steps = self.exact_steps(duration, path=path)
        if self.progress is not None and duration.unit != 'steps':
            steps = self.progress.step_at(steps)
        return math.ceil(steps)

    def period(self, duration: Duration, *, path: str) -> Periodic:
        """Returns the event with a duration as its period."""
        if duration.unit == 'never':
            return Periodic(None)
        progress = None if duration.unit == 'steps' else self.progress
        return Periodic(self.exact_steps(duration, path=path), progress)


def resolve(node: Any, clock: Clock, path: str) -> tuple[Any, dict[str, int]]:
    """Replaces every string that consists of a duration by its number of steps.

    Args:
        node: a value of the config; keys of dicts are replaced too, as in `{'50%': 0.1}`.
        clock: converts durations to steps.
        path: key path of the value.

    Returns:
        The new value, and the number of steps of each duration by its path.

    Raises:
        UserError: if two keys of a dict are the same step.
    """
    steps_by_path: dict[str, int] = {}

    def to_steps(value: str, where: str) -> int:
        steps_by_path[where] = clock.steps(Duration.parse(value, where, zero=True), path=where)
        return steps_by_path[where]

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            walked: dict[Any, Any] = {}
            for key, item in value.items():
                step = to_steps(key, f'{where}.{key}') if is_duration(key) else key
                # In a short run '50%' and '60%' may round up to the same step; a dict would
                # silently keep the last.
                if step in walked:
                    same = next(k for k in value if steps_by_path.get(f'{where}.{k}', k) == step)
                    raise UserError(
                        f'{where}: {same!r} and {key!r} are both step {step}. Remove one of them, '
                        'or make the run longer (config.train_for)'
                    )
                walked[step] = walk(item, f'{where}.{key}')
            return walked
        if isinstance(value, (tuple, list)):
            return type(value)(walk(v, f'{where}[{i}]') for i, v in enumerate(value))
        # 'never' is not a number of steps, and may be an ordinary argument of the target.
        return to_steps(value, where) if is_duration(value) and value != 'never' else value

    return walk(node, path), steps_by_path
