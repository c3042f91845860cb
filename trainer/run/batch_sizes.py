# SPDX-License-Identifier: Apache-2.0
"""The batch sizes that a run has used: they convert steps to examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.errors import CheckpointError
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
    def of_run(cls, workdir: Workdir | None, batch_size: int) -> BatchSizes:
        """Returns the batch sizes of a run that resumes in a work directory, with this one last."""
        fresh = cls(((0, batch_size),))
        if workdir is None:
            return fresh
        checkpoints = Checkpoints(workdir.checkpoints, Retention())
        latest = checkpoints.latest()
        if latest is None:
            return fresh
        try:
            meta = checkpoints.meta(latest)
        except CheckpointError:
            return fresh  # Restoring will fail and report the reason.
        return cls.of_checkpoint(meta, batch_size).going_on(latest, batch_size)

    @classmethod
    def of_checkpoint(cls, meta: Mapping[str, Any], batch_size: int) -> BatchSizes:
        """Returns the batch sizes stored in a checkpoint; in an older one, that of its config."""
        if 'batch_sizes' in meta:
            return cls(tuple((step, size) for step, size in meta['batch_sizes']))
        return cls(((0, meta.get('config', {}).get('data', {}).get('batch_size', batch_size)),))

    def going_on(self, step: int, batch_size: int) -> BatchSizes:
        """Returns the batch sizes of a run that resumes at a step with this batch size."""
        parts = tuple(part for part in self.parts if part[0] < step)
        if parts and parts[-1][1] == batch_size:
            return BatchSizes(parts)
        return BatchSizes((*parts, (step, batch_size)))

    def changed_at(self, step: int) -> int | None:
        """Returns the previous size if the current one begins at this step, but not at step 0."""
        first, _ = self.parts[-1]
        return self.parts[-2][1] if first == step and len(self.parts) > 1 else None

    def examples(self, step: int) -> int:
        """Returns the number of rows that the steps up to this one have consumed."""
        ends = (*(first for first, _ in self.parts[1:]), step)
        starts = zip(self.parts, ends, strict=True)
        return sum((end - first) * size for (first, size), end in starts)


def resized(experiment: Experiment, sizes: BatchSizes, step: int, before: int) -> str:
    """Returns the message of a run that resumes at `step` with another batch size."""
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


def place_in_other_data(
    experiment: Experiment, sizes: BatchSizes, step: int, before: int | None
) -> str:
    """Describes where a run resumes whose training data has another length than before."""
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
