# SPDX-License-Identifier: Apache-2.0
"""The schedule of a run's events: log, evaluate, save, capture, profile, and hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from trainer.config.durations import Periodic
from trainer.experiment import Experiment
from trainer.observe.profile import Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
    """The events of a run; those due after the same step run in the order log, eval,
    hooks with a period, save.

    Attributes:
        log: when rows are written; the last step always has one.
        evals: when each evaluation runs, by name.
        save: when the state is saved; the last one always is.
        final: names of the evaluations that also run at the end.
        profile: the steps that are profiled, or None.
        captures: when each capture runs.
        hooks: when each hook with a period of its own is called, by name.
        total_steps: length of the run.
    """

    log: Periodic
    evals: Mapping[str, Periodic]
    save: Periodic
    final: frozenset[str]
    profile: Window | None = None
    captures: tuple[Periodic, ...] = ()
    hooks: Mapping[str, Periodic] = dataclasses.field(default_factory=dict)
    total_steps: int

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> Events:
        """Returns the events of an experiment."""
        clock = experiment.clock
        return cls(
            log=clock.period(experiment.logging.every, path='config.log.every'),
            evals={
                name: clock.period(spec.every, path=f'config.evals.{name}.every')
                for name, spec in experiment.evals.items()
            },
            save=clock.period(experiment.saving.every, path='config.checkpoint.every'),
            final=frozenset(name for name, spec in experiment.evals.items() if spec.final),
            profile=experiment.logging.profile,
            captures=tuple(capture.every for capture in experiment.logging.captures.values()),
            hooks={
                name: clock.period(rules.every, path=f'config.hooks.{name}.every')
                for name, rules in experiment.hook_rules.items()
                if rules.every is not None
            },
            total_steps=experiment.training.total_steps,
        )

    def evals_due(self, step: int) -> list[str]:
        """Returns the evaluations due at a step, in the config's order."""
        # Every period divides 0, but there is nothing to evaluate before the first update.
        if step == 0:
            return []
        ending = self.final if step == self.total_steps else frozenset()
        return [name for name, each in self.evals.items() if each.is_due(step) or name in ending]

    def hooks_due(self, step: int) -> list[str]:
        """Returns the hooks with a period that are due at a step, in the config's order."""
        return [name for name, each in self.hooks.items() if each.is_due(step)]

    def next_due(self, step: int) -> int | None:
        """Returns the first step after `step` with an event, or None; the end of the run is one."""
        named = (*self.evals.values(), *self.hooks.values())
        due = [p.next_due(step) for p in (self.log, self.save, *self.captures, *named)]
        # A trace starts and stops between calls of a program, so its borders have to end a call.
        borders = (self.profile.start, self.profile.stop) if self.profile else ()
        due += [border for border in (*borders, self.total_steps) if border > step]
        return min((d for d in due if d is not None), default=None)

    def calls(self, step: int, last: int, most: int) -> Iterator[int]:
        """Yields the number of steps of each call: `most`, or 1 if an event is closer than that.

        So at most two programs are compiled, one for `most` fused steps and one for a single step.

        Args:
            step: number of completed updates.
            last: the step to stop at.
            most: fused steps per call.
        """
        due = self.next_due(step)
        while step < last:
            room = min(last, due or last) - step
            # Not `min(most, room)`: every other count would compile a further program.
            count = most if room >= most else 1
            yield count
            step += count
            if step == due:
                due = self.next_due(step)
