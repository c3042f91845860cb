# SPDX-License-Identifier: Apache-2.0
"""Checks the result of a task, with messages that say what it should return."""

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
    """Returns 'mine.task:soft_margin' for a function or class, the class for an object of it."""
    named = task if inspect.isroutine(task) or inspect.isclass(task) else type(task)
    return public_name(named)


def require_array(output: Any, task: Any, what: str) -> jax.Array:
    """Returns what a model has returned, if it is one array.

    Args:
        output: of the model.
        task: that expects an array.
        what: such as 'logits', for the message.

    Raises:
        UserError: for a tuple, a dict, or any other object.
    """
    if not isinstance(output, (jax.Array, np.ndarray)):
        raise UserError(
            f'config.task: the model returned {describe(output)}, and {name_of(task)} expects one '
            f'array, the {what}. Write a task that picks it: see docs/tutorial.md'
        )
    return jnp.asarray(output)


def refusal(result: Any) -> str:
    """Returns the message for a result that has none of the supported forms."""
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
                f'returned {kind} that are {describe(values)}: expected a dict, a value by name'
            )
    for name, value in metrics.items():
        if not all(hasattr(x, 'dtype') or _is_scalar(x) for x in jax.tree.leaves(value)):
            raise UserError(
                f'returned the metric {name!r} that is {describe(value)}: expected an array with '
                'one value for each example'
            )
    losses: Mapping[str | None, Any] = loss if isinstance(loss, Mapping) else {None: loss}
    for name, values in losses.items():
        _check_loss(name, values, metrics)
        mine = weights.get(name) if isinstance(weights, Mapping) else weights
        if mine is not None:
            _check_weights(mine, values)
    for name, penalty in penalties.items():
        if not _is_scalar(penalty):
            raise UserError(
                f'returned the penalty {name!r} that is {describe(penalty)}: expected a scalar, '
                'such as its sum. What differs from example to example belongs in the loss'
            )


def check_rows(loss: Any, mask: jax.Array) -> None:
    """Checks that a loss has the rows of a batch in which some are padding.

    Raises:
        UserError: naming both shapes.
    """
    if jnp.shape(loss)[:1] != mask.shape:
        raise UserError(
            f'returned the loss {describe(loss)} of a batch of {mask.shape[0]} rows, some of which '
            f'may be padding: expected one loss for each row, [{mask.shape[0]}, ...]'
        )


def warn_about_pairs(loss: Any, batch: Mapping[str, Any], task: Any) -> None:
    """Warns once of a loss for each pair of examples, which broadcasting makes by mistake.

    Args:
        loss: of the task.
        batch: arrays (rows, ...); a field of (rows, rows, ...), or of one more, which next tokens
            are taken from, explains such a loss.
        task: whose loss.
    """
    shapes = [jnp.shape(x) for x in batch.values()]
    rows = next((shape[0] for shape in shapes if shape), 1)
    expected = {(rows, rows), (rows, rows + 1)}
    # Images are patched, and what has more dimensions is of another kind.
    is_explained = any(x[:2] in expected or len(x) > 2 for x in shapes)
    if rows == 1 or jnp.shape(loss) != (rows, rows) or is_explained:
        return
    name = name_of(task)
    if name in _warned:  # It is traced several times, and again for each evaluation.
        return
    _warned.add(name)
    _log.warning(
        'the task %s returned the loss %s of a batch of %d rows, a value for each pair of '
        'examples. If that is not meant: arrays of the shapes [%d, 1] and [%d] broadcast to pairs; '
        'reshape one of them',
        *(name, describe(loss), rows, rows, rows),
    )


def check_differentiable(loss: Any) -> None:
    """Checks that losses are real floating-point numbers.

    Raises:
        UserError: naming the one that is not.
    """
    for name, values in (loss if isinstance(loss, Mapping) else {'': loss}).items():
        which = f'the loss {name!r}' if name else 'a loss'
        if jnp.iscomplexobj(values):
            raise UserError(
                f'the task returned {which} that is {describe(values)}: expected real numbers, '
                'such as its absolute value'
            )
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise UserError(
                f'the task returned {which} that is {describe(values)}, which has no gradient: '
                'expected floating-point numbers. Return hits and counts among the metrics'
            )


def _check_loss(name: str | None, values: Any, metrics: Any) -> None:
    which = 'a loss' if name is None else f'the loss {name!r}'
    hint = ''
    if name is not None:
        hint = '. A dict means several losses by name; one loss and its metrics are (loss, dict)'
    if not isinstance(values, (jax.Array, np.ndarray)) and not _is_scalar(values):
        raise UserError(
            f'returned {which} that is {describe(values)}: expected an array with the loss of each '
            f'example, (batch, ...){hint}'
        )
    if _is_scalar(values):
        raise UserError(f'returned {which} that is a scalar, {describe(values)}: {_NO_MEAN}{hint}')


def _check_weights(weights: Any, loss: Any) -> None:
    is_number = isinstance(weights, (jax.Array, np.ndarray, int, float, np.generic))
    shape = jnp.shape(weights) if is_number else None
    if shape is None or shape != jnp.shape(loss)[: len(shape)]:
        rows = list(jnp.shape(loss)[:1])
        raise UserError(
            f'returned weights that are {describe(weights)} for a loss of {describe(loss)}: '
            f'expected {rows}, one for each example, or the shape of the loss'
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, np.generic)) or (
        isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0
    )
