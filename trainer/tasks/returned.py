# SPDX-License-Identifier: Apache-2.0
"""Checks of the result of a task, with messages that explain what it should return."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.advice import public_name
from trainer.config.errors import UserError
from trainer.modules.seen import describe

_log = logging.getLogger('trainer')
# Names of the tasks that `warn_about_pairs` has warned about.
_warned: set[str] = set()

_FORMS = (
    'A task returns the loss of each example, (batch, ...); or (loss, dict of metrics); or a '
    'TaskOutput'
)
_PAIR = (
    'The first item must be the loss of each example, (batch, ...){mean}, and the second a dict of '
    "metrics with one value for each example: return loss, {{'accuracy': logits.argmax(-1) == "
    'labels}}'
)
_NO_MEAN = (
    'a task returns one loss for each example, (batch, ...), not their mean: leave out .mean() or '
    '.sum() over the batch. The step averages, exactly for any mask and any number of devices'
)


def name_of(task: Any) -> str:
    """Returns 'mine.task:soft_margin' for a function or class; for an object, its class."""
    task = getattr(task, '_named_task', task)  # Of a `ScoredTask`, which has no name of its own.
    named = task if inspect.isroutine(task) or inspect.isclass(task) else type(task)
    return public_name(named)


def require_array(output: Any, task: Any, what: str) -> jax.Array:
    """Returns the output of a model as an array.

    Args:
        output: what the model returned.
        task: the task that expects an array.
        what: such as 'logits', for the message.

    Raises:
        UserError: for a tuple, a dict, or any other object.
    """
    if not isinstance(output, (jax.Array, np.ndarray)):
        raise UserError(
            f'config.task: the model returned {describe(output)}, and {name_of(task)} expects one '
            f'array, the {what}. Write a task that selects it: see docs/tutorial.md'
        )
    return jnp.asarray(output)


def invalid_result_message(result: Any) -> str:
    """Returns the error message for a result that has none of the supported forms."""
    text = f'returned {describe(result)}. '
    if result is None:
        return f'{text}Is a return statement missing? {_FORMS}'
    if type(result) in (tuple, list) and len(result) == 2:
        mean = ', not their mean' if _is_scalar(result[0]) else ''
        return text + _PAIR.format(mean=mean)
    if _is_scalar(result):
        return text + _NO_MEAN.capitalize()
    if isinstance(result, np.ndarray):
        return f'{text}Values computed with numpy have no gradient: use jax.numpy'
    return text + _FORMS


def check(loss: Any, weights: Any, metrics: Any, penalties: Any) -> None:
    """Checks kinds and shapes of the parts of a task's result.

    Raises:
        UserError: naming the part, what it is and what is expected.
    """
    for kind, values in {'metrics': metrics, 'penalties': penalties}.items():
        if not isinstance(values, Mapping):
            raise UserError(
                f'returned {describe(values)} as {kind}: expected a dict of values by name'
            )
    for name, value in metrics.items():
        # Shapes are not checked: a collection of the task's own may take inputs of any shape.
        if not all(hasattr(x, 'dtype') or _is_scalar(x) for x in jax.tree.leaves(value)):
            raise UserError(
                f'returned {describe(value)} as the metric {name!r}: expected an array with one '
                'value for each example'
            )
    losses: Mapping[str | None, Any] = loss if isinstance(loss, Mapping) else {None: loss}
    for name, values in losses.items():
        _check_loss(name, values, metrics)
        own = weights.get(name) if isinstance(weights, Mapping) else weights
        if own is not None:
            _check_weights(own, values)
    for name, penalty in penalties.items():
        if not _is_scalar(penalty):
            raise UserError(
                f'returned {describe(penalty)} as the penalty {name!r}: expected a scalar, such as '
                'its sum. Add a penalty of each example to the loss'
            )


def check_num_examples(loss: Any, mask: jax.Array) -> None:
    """Checks that dimension 0 of a loss is the batch, so that padding can be masked out.

    Args:
        loss: what the task returned as its loss.
        mask: bool (batch,), False for padding.

    Raises:
        UserError: naming both shapes.
    """
    if jnp.shape(loss)[:1] != mask.shape:
        raise UserError(
            f'returned the loss {describe(loss)} for a batch of {mask.shape[0]} examples, some of '
            f'which may be padding: expected one loss for each example, [{mask.shape[0]}, ...]'
        )


def warn_about_pairs(loss: Any, batch: Mapping[str, Any], task: Any) -> None:
    """Warns once about a loss with a value for each pair of examples, a mistake of broadcasting.

    Args:
        loss: what the task returned as its loss.
        batch: arrays (batch, ...). A loss (batch, batch) is not a mistake if examples are sequences
            of that length, or one longer, for next-token losses.
        task: the task, for its name.
    """
    shapes = [jnp.shape(x) for x in batch.values()]
    size = next((shape[0] for shape in shapes if shape), 1)
    sequences = {(size, size), (size, size + 1)}
    # Images may have as many patches as there are examples, and so may arrays of more dimensions.
    is_explained = any(x[:2] in sequences or len(x) > 2 for x in shapes)
    if size == 1 or jnp.shape(loss) != (size, size) or is_explained:
        return
    name = name_of(task)
    if name in _warned:  # A task is traced several times, and again for each evaluation.
        return
    _warned.add(name)
    _log.warning(
        'the task %s returned the loss %s for a batch of %d examples, a value for each pair of '
        'examples. If this is not intended: arrays of shapes [%d, 1] and [%d] broadcast to pairs; '
        'reshape one of them',
        *(name, describe(loss), size, size, size),
    )


def check_differentiable(loss: Any) -> None:
    """Checks that losses are real floating-point numbers.

    Raises:
        UserError: naming the one that is not.
    """
    for name, values in (loss if isinstance(loss, Mapping) else {'': loss}).items():
        which = f'the loss {name!r}' if name else 'the loss'
        if jnp.iscomplexobj(values):
            raise UserError(
                f'the task returned {describe(values)} as {which}: expected real numbers, such as '
                'absolute values'
            )
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise UserError(
                f'the task returned {describe(values)} as {which}, which has no gradient: expected '
                'floating-point numbers. Return hits and counts among the metrics'
            )


def _check_loss(name: str | None, values: Any, metrics: Any) -> None:
    which = 'the loss' if name is None else f'the loss {name!r}'
    hint = ''
    if name is not None:
        # A likely mistake: (loss, metrics) meant, and a dict of both returned.
        hint = '. A dict means several losses by name; one loss and its metrics are (loss, dict)'
    if not isinstance(values, (jax.Array, np.ndarray)) and not _is_scalar(values):
        raise UserError(
            f'returned {describe(values)} as {which}: expected an array with the loss of each '
            f'example, (batch, ...){hint}'
        )
    if _is_scalar(values):
        raise UserError(f'returned a scalar, {describe(values)}, as {which}: {_NO_MEAN}{hint}')


def _check_weights(weights: Any, loss: Any) -> None:
    is_number = isinstance(weights, (jax.Array, np.ndarray, int, float, np.generic))
    shape = jnp.shape(weights) if is_number else None
    # A prefix of the loss's shape, so () is one weight for all examples.
    if shape is None or shape != jnp.shape(loss)[: len(shape)]:
        per_example = list(jnp.shape(loss)[:1])
        raise UserError(
            f'returned {describe(weights)} as the weights of a loss {describe(loss)}: expected '
            f'{per_example}, one for each example, or the shape of the loss'
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, np.generic)) or (
        isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0
    )
