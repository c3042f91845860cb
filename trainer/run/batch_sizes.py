# SPDX-License-Identifier: Apache-2.0
"""The batch sizes that a run has used, which convert steps to examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.manager import Checkpoints
from trainer.checkpoint.retention import Retention
from trainer.experiment import Experiment
from trainer.run.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run.

    Attributes:
        parts: (first step, batch size) of each part of the run, from step 0 on.
    """

    parts: tuple[tuple[int, int], ...]

    @classmethod
    def from_run(cls, workdir: Workdir | None, batch_size: int) -> BatchSizes:
        """Returns the batch sizes of a run in a work directory, ending with the current one."""
        fresh = cls(((0, batch_size),))
        if workdir is None:
            return fresh
        # Only to read metadata. The retention of the config is not built yet: it needs the clock,
        # which needs these batch sizes.
        checkpoints = Checkpoints(workdir.checkpoints, Retention())
        latest = checkpoints.newest_sound()
        if latest is None:
            return fresh  # If all are damaged, restoring will report the reasons.
        meta = checkpoints.meta(latest)
        return cls.from_checkpoint(meta, batch_size).with_size(latest, batch_size)

    @classmethod
    def from_checkpoint(cls, meta: Mapping[str, Any], batch_size: int) -> BatchSizes:
        """Returns the batch sizes stored in a checkpoint.

        Checkpoints from before batch sizes were stored have only the one of their config.
        """
        if 'batch_sizes' in meta:
            # JSON has no tuples, and the parts are compared with those of `from_run`.
            return cls(tuple((step, size) for step, size in meta['batch_sizes']))
        return cls(((0, meta.get('config', {}).get('data', {}).get('batch_size', batch_size)),))

    def with_size(self, step: int, batch_size: int) -> BatchSizes:
        """Returns the batch sizes of a run that resumes at `step` with this batch size."""
        # A part that begins at `step` or later is of a run that went further, and whose newer
        # checkpoints are gone.
        parts = tuple(part for part in self.parts if part[0] < step)
        if parts and parts[-1][1] == batch_size:
            return BatchSizes(parts)
        return BatchSizes((*parts, (step, batch_size)))

    def previous_size(self, step: int) -> int | None:
        """Returns the batch size before `step` if it changes there, otherwise None."""
        first, _ = self.parts[-1]
        return self.parts[-2][1] if first == step and len(self.parts) > 1 else None

    def examples(self, step: int) -> int:
        """Returns the number of examples consumed by the end of a step."""
        # Each part ends where the next one begins, the last one at `step`.
        ends = (*(first for first, _ in self.parts[1:]), step)
        starts = zip(self.parts, ends, strict=True)
        return sum((end - first) * size for (first, size), end in starts)


def describe_resize(experiment: Experiment, sizes: BatchSizes, step: int, before: int) -> str:
    """Returns the message for a run that resumes at `step` with another batch size."""
    clock, total = experiment.clock, experiment.training.total_steps
    lines = [
        f'config.data.batch_size {before} -> {clock.batch_size}: resuming at step {step:,}, '
        f'after {sizes.examples(step):,} examples{_epochs(experiment, step)}; the run ends '
        f'at step {total:,}{_epochs(experiment, total)}. Step numbers continue; everything else '
        'counts examples.'
    ]
    if experiment.origin.schedule_steps:
        now, end = (float(clock.batches(at)) for at in (step, total))
        lines.append(
            f'Schedules in epochs, examples or % continue where they were: in steps {step:,} to '
            f'{total:,} they have the values of steps {now:,.6g} to {end:,.6g} of a run with batch '
            f'size {clock.batch_size}. Schedules in steps continue at step {step:,}.'
        )
    elif experiment.optimizer.learning_rates is not None:
        lines.append(
            f'A schedule with plain numbers counts steps: it continues at step {step:,} '
            f'and is at {total:,} when the run ends.'
        )
    return '\n'.join(lines)


def describe_position_in_new_data(
    experiment: Experiment, sizes: BatchSizes, step: int, before: int | None
) -> str:
    """Returns a sentence on where a run resumes if its training data has changed in length."""
    data = experiment.data
    if before is None or data.examples is None:
        return ''
    return (
        f'The run resumes after {sizes.examples(step):,} examples'
        f'{_epochs(experiment, step)}, in the order of the new data ({data.examples:,} examples): '
        'in the current epoch, some examples are repeated and others skipped.'
    )


def _epochs(experiment: Experiment, step: int) -> str:
    clock = experiment.clock
    if clock.steps_per_epoch is None:
        return ''
    return f' ({float(clock.batches(step) / clock.steps_per_epoch):,.6g} epochs)'
