# SPDX-License-Identifier: Apache-2.0
"""What a hook of `config.hooks` is called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.step import donated


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
        status: at 'end' that of `trainer.run.result.Result`, 'failed' or 'diverged'.
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
