# SPDX-License-Identifier: Apache-2.0
"""Which batch sizes a run has had: from them follows what a step is in examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import Checkpoints
from trainer.checkpoint.retention import Retention
from trainer.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run.

    Attributes:
        parts: (first step, batch size) of each part of the run, from step 0 on.
    """

    parts: tuple[tuple[int, int], ...]

    @classmethod
    def of_run(cls, workdir: Workdir | None, batch_size: int) -> BatchSizes:
        """Returns those of a run that goes on in a work directory, the last one as given."""
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
            return fresh  # Whoever restores it says so.
        return cls.of_checkpoint(meta, batch_size).going_on(latest, batch_size)

    @classmethod
    def of_checkpoint(cls, meta: Mapping[str, Any], batch_size: int) -> BatchSizes:
        """Returns those that a checkpoint has kept; of an older one that of its config."""
        if 'batch_sizes' in meta:
            return cls(tuple((step, size) for step, size in meta['batch_sizes']))
        return cls(((0, meta.get('config', {}).get('data', {}).get('batch_size', batch_size)),))

    def going_on(self, step: int, batch_size: int) -> BatchSizes:
        """Returns those of a run that goes on from a step in batches of this size."""
        parts = tuple(part for part in self.parts if part[0] < step)
        if parts and parts[-1][1] == batch_size:
            return BatchSizes(parts)
        return BatchSizes((*parts, (step, batch_size)))

    def changed_at(self, step: int) -> int | None:
        """Returns the size before, if the present one begins at this step and not with the run."""
        first, _ = self.parts[-1]
        return self.parts[-2][1] if first == step and len(self.parts) > 1 else None

    def examples(self, step: int) -> int:
        """Returns the number of rows that the steps up to this one have consumed."""
        ends = (*(first for first, _ in self.parts[1:]), step)
        starts = zip(self.parts, ends, strict=True)
        return sum((end - first) * size for (first, size), end in starts)
