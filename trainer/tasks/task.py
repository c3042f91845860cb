# SPDX-License-Identifier: Apache-2.0
"""The interface of a task, which computes one loss per example of a batch.

A task is a callable `task(model, batch) -> TaskOutput`. The step minimizes
sum(weight x loss) / sum(weight) over the global batch, plus the penalties; a task never averages.
A plain function may return the loss values alone, or `(values, metrics)`.

A task of several losses (a GAN) returns a dict of values, one entry for each loss, and
`config.optimizer.groups` assigns parameters to each of them. All come from one forward pass.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

from trainer.config.errors import UserError
from trainer.tasks import returned
from trainer.tasks.checks import Check

Batch = Mapping[str, jax.Array]

# The name of the loss of a task that returns only one, without a name.
ONLY_LOSS = 'loss'

# The key for the weights of the metrics in a dict of weights by loss.
METRIC_WEIGHTS = 'metrics'

# Inputs of every metric, in addition to the task's own.
_GIVEN = ('loss', 'weights', 'mask')

# Metrics of each row that are measured on the host, between steps.
THROUGHPUT = ('steps_per_sec', 'examples_per_sec', 'data_wait_secs')

# Metrics that a row has for every task; a task's metrics must have other names.
OWN_NAMES = {
    *('learning_rate', 'grad_norm', 'param_norm', 'update_norm', 'loss_scale', 'skipped_updates'),
    *(*THROUGHPUT, 'examples'),
}


@flax.struct.dataclass
class TaskOutput:
    """The result of a task for a batch.

    Attributes:
        loss: (batch, ...) loss values, one per example (or per token); or a dict of several such
            losses, whose names are Python identifiers. These are reported as `<name>_loss`.
        weights: (batch,) or the shape of `loss`; None weights all equally. With named losses, one
            array for all or a dict by name; a loss without an entry is weighted equally, and the
            entry 'metrics' has the weights of the metrics.
        metrics: inputs of the task's metrics. If the task has no attribute `metrics`, each of them
            is averaged with the weights of the loss.
        penalties: named scalars that are added to the loss (to each loss of several), such as an L2
            term.
        checks: range checks by batch key; a value out of range stops the run.
        summaries: `trainer.summaries.Images`, `Histogram` or `Arrays` by name, of arrays with one
            entry for each example, or for the first few. Each evaluation writes those of its first
            batch, without padding. Training does not compute them.
    """

    loss: jax.Array | Mapping[str, jax.Array]
    weights: jax.Array | Mapping[str, jax.Array] | None = None
    metrics: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    penalties: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    checks: Mapping[str, Check] = flax.struct.field(default_factory=dict)
    summaries: Mapping[str, Any] = flax.struct.field(default_factory=dict)


def as_output(result: Any, *, averaged: bool = True) -> TaskOutput:
    """Converts a task's result to a TaskOutput, and checks it.

    Args:
        result: what the task returned: a loss, a pair or a `TaskOutput`.
        averaged: whether its metrics are averaged and reported under their names; otherwise they
            are the inputs of the task's own collection.

    Raises:
        UserError: if the result is none of TaskOutput, values, or (values, metrics); if a loss is a
            scalar, because the step averages and not the task; if types, shapes or names are
            invalid. The message continues a sentence that begins with the name of the task.
    """
    # Only with a dict as the second item: (loss, logits), as in Flax's examples, is a mistake that
    # `invalid_result_message` explains.
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result = TaskOutput(loss=result[0], metrics=result[1])
    elif isinstance(result, (jax.Array, Mapping)):
        result = TaskOutput(loss=result)
    if not isinstance(result, TaskOutput):
        raise UserError(returned.invalid_result_message(result))
    returned.check(result.loss, result.weights, result.metrics, result.penalties)
    _check_names(result, averaged)
    return result


def _check_names(output: TaskOutput, averaged: bool) -> None:
    loss, weights = output.loss, output.weights
    names = tuple(loss) if isinstance(loss, Mapping) else ()
    if isinstance(loss, Mapping) and not names:
        raise UserError('returned an empty dict of losses')
    for name in names:
        if not str(name).isidentifier() or name == METRIC_WEIGHTS:
            raise UserError(
                f'names a loss {name!r}: expected a Python identifier other than '
                f"{METRIC_WEIGHTS!r}; the loss is reported as '<name>_loss'"
            )
    for name in weights if isinstance(weights, Mapping) else ():
        if not names or name not in (*names, METRIC_WEIGHTS):
            raise UserError(
                f'returned weights for {name!r}, which is not a loss; it names '
                + (f'the losses {", ".join(names)}' if names else 'no losses')
            )
    # Inputs of the metrics are passed by name in one call, where a second value would be lost.
    taken = {*_GIVEN, *(f'{name}_{kind}' for name in names for kind in ('loss', 'weights'))}
    reported = taken | OWN_NAMES
    for name in output.metrics:
        if averaged and not _is_reportable(name):
            raise UserError(
                f"names a metric {name!r}: expected a Python identifier, such as 'top_5', that is "
                'not a keyword'
            )
        if name in (reported if averaged else taken):
            raise UserError(duplicate_name_message('metric', name))
    for name in output.penalties:
        if name in reported | (set(output.metrics) if averaged else set()):
            raise UserError(duplicate_name_message('penalty', name))


def _is_reportable(name: Any) -> bool:
    # The means accumulate in a dataclass whose fields have these names.
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def duplicate_name_message(kind: str, name: str) -> str:
    """Returns the error message for a name that a row of metrics has already."""
    return f'names a {kind} {name!r}, but this name is reserved; choose another'
