# SPDX-License-Identifier: Apache-2.0
"""The event passed to the hooks of `config.hooks`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.step import donated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """The argument of a hook, which is called as `hook(event)`.

    At 'log' and 'eval', a hook may return a dict of values by name, which are added to the row of
    that event: numbers, arrays, texts, and the summaries of `trainer.summaries`. At an evaluation
    'dev', 'bleu' is short for 'eval/dev/bleu'; at 'log', 'x' is short for 'train/x'. At 'step',
    the values are a row of their own: 'x' of the hook 'mine' is 'hook/mine/x'. At other events
    values are an error.

    Attributes:
        kind: 'start', 'log', 'eval', 'save' or 'end'; a hook with `every` gets 'step' in place of
            'log', 'eval' and 'save'. Each 'start' is followed by one 'end', even if the run fails.
        step: number of completed steps.
        state: the state at this step. It is donated to the next step: keep a copy, such as
            `jax.tree.map(jnp.copy, event.state)`. None at the end of a run that failed.
        metrics: latest value of every metric of the run, by flat name.
        workdir: the run's directory, or None.
        row: at 'log' and 'eval', the row that is written to `metrics.jsonl` after the hooks:
            'step', and values by flat name. NaN and infinity are null in the file. Empty at other
            events.
        evaluation: at 'eval', the name of the evaluation in `config.evals`.
        config: a copy of the resolved config as dicts, which JSON can write.
        status: at 'end', the status of `trainer.run.result.Result`, 'failed' or 'diverged'.
        error: at the 'end' of a failed run, its error: 'ValueError: ...'.
    """

    kind: str
    step: int
    # Comparing arrays gives an array, and printing them would copy them from the devices.
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
        if name == 'state':  # A hook may have kept the event after its state was donated.
            donated.check(value, 'event.state')
        return value
