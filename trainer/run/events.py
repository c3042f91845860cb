# SPDX-License-Identifier: Apache-2.0
"""When things happen in a run, and what a hook is told of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.durations import Periodic
from trainer.step import donated

if TYPE_CHECKING:
    from trainer.experiment import Experiment
    from trainer.observe.profile import Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What a hook is called with: `hook(event)`.

    Attributes:
        kind: 'start', 'log', 'eval', 'save' or 'end'. Each 'start' is followed by one 'end', even
            if the run fails.
        step: number of completed updates.
        state: the state at this step. It is donated to the next step: keep a copy, such as
            `jax.tree.map(jnp.copy, event.state)`. None at the end of a run that failed.
        metrics: flat name to value: the newest of every metric of the run so far.
        workdir: the run's directory, or None.
        row: at 'log' and 'eval' the row just written to `metrics.jsonl`: 'step', and values by flat
            name. NaN and infinity are null in the file. Empty at other events.
        evaluation: at 'eval' its name in `config.evals`.
        config: the resolved config, plain; do not change it.
        status: at 'end' that of `trainer.trainer.Result`, 'failed' or 'diverged'.
        error: at the 'end' of a failed run, its error: 'ValueError: ...'.
    """

    kind: str
    step: int
    state: Any = dataclasses.field(repr=False, compare=False)
    metrics: Mapping[str, float]
    workdir: str | None
    row: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluation: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: str | None = None
    error: str | None = None

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == 'state':  # Of an event that a hook has kept.
            donated.check(value, 'event.state')
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
    """The events of a run; all that are due after one step run log, eval, save.

    Attributes:
        log: when rows are written; the steps that are left at the end have one too.
        evals: when each evaluation runs, by name.
        save: when the state is saved; that at the end always is.
        final: names of the evaluations that run at the end too.
        profile: the steps that are traced, or None.
        captures: when each capture runs.
        total_steps: length of the run.
    """

    log: Periodic
    evals: Mapping[str, Periodic]
    save: Periodic
    final: frozenset[str]
    profile: Window | None = None
    captures: tuple[Periodic, ...] = ()
    total_steps: int

    @classmethod
    def of(cls, experiment: Experiment) -> Events:
        """Returns the events of an experiment."""
        clock = experiment.clock
        return cls(
            log=clock.period(experiment.log_every, path='config.log.every'),
            evals={
                name: clock.period(spec.every, path=f'config.evals.{name}.every')
                for name, spec in experiment.evals.items()
            },
            save=clock.period(experiment.save_every, path='config.checkpoint.every'),
            final=frozenset(name for name, spec in experiment.evals.items() if spec.final),
            profile=experiment.profile,
            captures=tuple(capture.every for capture in experiment.captures.values()),
            total_steps=experiment.total_steps,
        )

    def evals_due(self, step: int) -> list[str]:
        """Returns the evaluations that are due at a step, in the config's order."""
        if step == 0:
            return []
        ending = self.final if step == self.total_steps else frozenset()
        return [name for name, each in self.evals.items() if each.due(step) or name in ending]

    def next_due(self, step: int) -> int | None:
        """Returns the first step after `step` with an event, or None if there is none.

        The end of the run is one.
        """
        due = [
            p.next_due(step) for p in (self.log, self.save, *self.captures, *self.evals.values())
        ]
        borders = (self.profile.start, self.profile.stop) if self.profile else ()
        due += [border for border in (*borders, self.total_steps) if border > step]
        return min((d for d in due if d is not None), default=None)

    def calls(self, step: int, last: int, most: int) -> Iterator[int]:
        """Yields how many updates each call makes: `most`, or 1 where an event is nearer."""
        due = self.next_due(step)
        while step < last:
            room = min(last, due or last) - step
            count = most if room >= most else 1
            yield count
            step += count
            if step == due:
                due = self.next_due(step)
