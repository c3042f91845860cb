# SPDX-License-Identifier: Apache-2.0
"""The task contract: what a model is asked to do with a batch, as one loss value per example.

A task is a callable `task(model, batch) -> TaskOutput`. The step minimises
sum(weight x loss) / sum(weight) over the global batch, plus the penalties; a task never averages.
A plain function may return the loss values alone, or `(values, metrics)`.

A task of several losses (a GAN) returns a dict of values, one entry for each loss, and
`config.optimizer.groups` says which parameters each one trains. All come from one forward pass.
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

# What the loss of a task is called that does not name it.
ONLY_LOSS = 'loss'

# Among the weights of named losses, those of the metrics.
METRIC_WEIGHTS = 'metrics'

# What metrics are made from beside the task's own.
_GIVEN = ('loss', 'weights', 'mask')

# What is measured of a step from outside.
MEASURED = ('steps_per_sec', 'examples_per_sec', 'data_wait_secs')

# What a row of metrics says of a step or of an evaluation, whatever the task.
OWN_NAMES = {
    *('learning_rate', 'grad_norm', 'param_norm', 'update_norm', 'loss_scale', 'skipped_updates'),
    *(*MEASURED, 'examples'),
}


@flax.struct.dataclass
class TaskOutput:
    """What a task says of a batch.

    Attributes:
        loss: (batch, ...) loss values, one per example (or per token); or several such by name,
            each a Python identifier. They are reported as `<name>_loss`.
        weights: (batch,) or the shape of `loss`; None weights all equally. With named losses either
            shared, or by name; a missing name weights all equally, and the entry 'metrics' has the
            weights of the metrics.
        metrics: what the task's metrics are made from; without a `metrics` attribute on the task,
            each is averaged with the weights of the loss.
        penalties: named scalars added to the loss once, such as an L2 term; to each of several.
        checks: by batch key, values that end the run if one is out of range.
    """

    loss: jax.Array | Mapping[str, jax.Array]
    weights: jax.Array | Mapping[str, jax.Array] | None = None
    metrics: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    penalties: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    checks: Mapping[str, Check] = flax.struct.field(default_factory=dict)


def as_output(result: Any, *, averaged: bool = True) -> TaskOutput:
    """Returns the TaskOutput of whatever form a task's result has.

    Args:
        result: what the task has returned.
        averaged: whether its metrics are averaged and reported under their names; or else the
            task's own collection makes something of them.

    Raises:
        UserError: if it is none of TaskOutput, values, or (values, metrics); if a loss is a scalar:
            the step averages, not the task; if kinds, shapes or names do not fit. Its text goes on
            from the name of the task.
    """
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result = TaskOutput(loss=result[0], metrics=result[1])
    elif isinstance(result, (jax.Array, Mapping)):
        result = TaskOutput(loss=result)
    if not isinstance(result, TaskOutput):
        raise UserError(returned.refusal(result))
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
                f'names a loss {name!r}. A name is a Python identifier, for the loss is '
                f"reported as '<name>_loss', and not {METRIC_WEIGHTS!r}"
            )
    for name in weights if isinstance(weights, Mapping) else ():
        if not names or name not in (*names, METRIC_WEIGHTS):
            raise UserError(
                f'returned weights for {name!r}; it names '
                + (f'the losses {", ".join(names)}' if names else 'no losses')
            )
    taken = {*_GIVEN, *(f'{name}_{kind}' for name in names for kind in ('loss', 'weights'))}
    reported = taken | OWN_NAMES
    for name in output.metrics:
        if averaged and not _is_reportable(name):
            raise UserError(
                f"names a metric {name!r}. A name is a Python identifier, such as 'top_5': "
                'letters, digits and underscores, and no keyword'
            )
        if name in (reported if averaged else taken):
            raise UserError(duplicate_name_message('metric', name))
    for name in output.penalties:
        if name in reported | (set(output.metrics) if averaged else set()):
            raise UserError(duplicate_name_message('penalty', name))


def _is_reportable(name: Any) -> bool:
    # Each is a field of a class, in which the means accumulate.
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def duplicate_name_message(kind: str, name: str) -> str:
    """Returns the message for a name that would hide another in a row of metrics."""
    return (
        f'names a {kind} {name!r}, but every row of metrics already has that name; choose another'
    )
