# SPDX-License-Identifier: Apache-2.0
"""The loss as an argument of optimizers: its value, and a function that computes it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax import contrib

from trainer import compat
from trainer.config.errors import UserError, shorten
from trainer.step.state import TrainState
from trainer.step.views import contains_state
from trainer.tasks.task import ONLY_LOSS

_WHERE = 'config.optimizer'


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss that is differentiated.

    Attributes:
        value: float32 scalar, the unscaled loss of the whole batch; for several losses, a dict of
            scalars.
        function: computes it at other parameters, on the same batch with the same random keys.
    """

    value: Any
    function: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class _PerLoss:
    """The values of several losses.

    Not registered as a pytree, so it is a leaf: masks for parameters do not look into it.
    """

    values: Mapping[str, Any]


def arguments(objective: Objective, grads: Any, state: TrainState) -> dict[str, Any]:
    """Returns the extra arguments for an optimizer with this state, by optax's names.

    All optimizers get `value`, `grad` and `value_fn`, which optax drops where they are unused.
    Other names go only to the optimizers that take them, because line searches reject them.
    """
    value, function = objective.value, objective.function
    if contains_state(state.opt_state, contrib.SAMState):  # It rejects all other names.
        return {'grad_fn': lambda params, _: _gradient(function, params)}
    if isinstance(value, Mapping):
        value = _PerLoss(value)
    extra = {'value': value, 'grad': grads, 'value_fn': function}
    return (
        {**extra, 'obj_fn': function}
        if contains_state(state.opt_state, contrib.HutchinsonState)
        else extra
    )


def _gradient(function: Callable[[Any], Any], params: Any) -> Any:
    def scalar_loss(params: Any) -> Any:
        value = function(params)
        if isinstance(value, Mapping):
            raise UserError(
                f'{_WHERE}: optax.contrib:sam with opaque_mode computes gradients of one loss, but '
                f'the task returns {", ".join(value)}. Remove opaque_mode'
            )
        return value

    return jax.grad(scalar_loss)(params)


def _select_loss(loss: Any, name: str) -> Any:
    """Returns the named loss; an unnamed loss is returned as it is."""
    return loss[name] if isinstance(loss, Mapping) else loss


def bind_loss(tx: optax.GradientTransformation, name: str | None) -> optax.GradientTransformation:
    """Wraps the optimizer of a group, so that it gets the value and function of its own loss only.

    Args:
        tx: optimizer as an `optax` transformation.
        name: name of the loss; None if the task has one unnamed loss.
    """
    if name is None:
        return tx
    inner = optax.with_extra_args_support(tx)

    def select(argument: str, value: Any) -> Any:
        if isinstance(value, _PerLoss):
            return value.values[name]
        if argument in ('value_fn', 'obj_fn'):
            return lambda params: _select_loss(value(params), name)
        # An argument of a custom step, which is the same for all groups.
        return value

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        selected = {argument: select(argument, value) for argument, value in more.items()}
        return inner.update(updates, state, params, **selected)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def needs_extra_arguments(losses: Sequence[str], opt_state: Any) -> bool:
    """Whether an optimizer takes more than the usual arguments: see `arguments`.

    Args:
        losses: names of the losses that drive some parameters.
        opt_state: the optimizer's state, or its shapes.
    """
    return losses != (ONLY_LOSS,) or contains_state(
        opt_state, (contrib.SAMState, contrib.HutchinsonState)
    )


def retry_update(
    error: Exception,
    update: Callable[..., tuple[Any, Any]],
    state: TrainState,
    provided: Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Calls an optimizer again without the arguments that it rejected, or explains its error.

    Args:
        error: the error of the first call.
        update: the optimizer's update, to be called with extra arguments.
        state: the state before the update.
        provided: the extra arguments that the step provides.
        given: the extra arguments of a custom step, which take precedence.

    Raises:
        UserError: if the optimizer needs more arguments, or fails within optax.
    """
    try:
        refused = compat.refused_argument(error)
        # An argument that the user passed must not be dropped silently.
        if refused is None or refused in given or refused not in provided:
            raise error
        # Against optax's convention, some optimizers take no extra arguments but their own.
        try:
            return update(**given)
        except TypeError as second:
            if compat.missing_arguments(second) is None:
                raise
            raise UserError(
                f'{_WHERE}: {error}. An update that takes extra arguments must also accept those '
                'of others (**extra_args): see optax.GradientTransformationExtraArgs'
            ) from second
    except UserError:
        raise
    except Exception as last:
        missing = compat.missing_arguments(last)
        if missing is not None:
            message = _missing_arguments_message(missing, state, provided)
        elif compat.is_optax_error(last):
            message = _failure_message(last, state)
        else:
            # From the user's own code, whose traceback says more than a message could.
            raise
        raise UserError(f'{_WHERE}: {message}') from last


def structure_error(updates: Any, opt_state: Any, state: TrainState) -> UserError:
    """Returns the error for an optimizer that returned trees of another structure than it got.

    Args:
        updates: what the optimizer returned as updates.
        opt_state: what the optimizer returned as its new state.
        state: the state before the update.
    """
    found, expected = map(str, map(jax.tree.structure, (updates, state.params)))
    if found != expected:
        return UserError(
            f'{_WHERE}: the optimizer must return updates with the structure of the parameters, '
            f'{shorten(expected)}, but it is {shorten(found)}. A measurement belongs in '
            'optax:snapshot, which returns the updates unchanged'
        )
    hint = 'Initialize every part of it'
    if contains_state(state.opt_state, optax.MonitorState):
        hint = 'optax:monitor adds its measurements only then; use optax:snapshot for each of them'
    return UserError(
        f"{_WHERE}: the structure of the optimizer's state changes with its first update, but a "
        f'compiled step and checkpoints need one. {hint}'
    )


def _failure_message(error: Exception, state: TrainState) -> str:
    masks = (
        'optax:masked and optax:partition pass grad on to a part of the parameters with '
        'mask_compatible_extra_args=True. '
    )
    text = str(error).rstrip('. ')
    return (
        f'the optimizer failed: {type(error).__name__}: {text}. It gets the gradient of the '
        'batch, its own state, the parameters, and value, grad and value_fn. '
        + masks * contains_state(state.opt_state, optax.MaskedState)
        + 'If it needs other arguments, call it in a custom step: config.step'
    )


def _missing_arguments_message(names: str, state: TrainState, provided: Mapping[str, Any]) -> str:
    example = f'ctx.update(state, grads, {re.split(r"[ ,]", names)[0]}=...)'
    if contains_state(state.opt_state, optax.MultiStepsState):
        return (
            f'it needs {names}, which optax:MultiSteps cannot provide, because it makes one '
            'update from several batches. Use config.accumulate instead of optax:MultiSteps'
        )
    if contains_state(state.opt_state, contrib.SAMState):
        return (
            f'it needs {names}, which optax.contrib:sam, chained with it, does not accept. Remove '
            'one of the two'
        )
    if not provided:
        return (
            f'it needs {names}, and config.step does not pass the gradients that ctx.gradients '
            f'returned. Pass it by name: {example}'
        )
    return (
        f'it needs {names}, which the trainer does not compute. Pass it by name in a custom step '
        f'(config.step): {example}'
    )
