# SPDX-License-Identifier: Apache-2.0
"""What optimizers take in addition to gradients: the loss, and a function that computes it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax import contrib

from trainer import compat
from trainer.config.errors import UserError
from trainer.step.state import TrainState
from trainer.step.views import contains_state
from trainer.tasks.task import ONLY_LOSS

_WHERE = 'config.optimizer'


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss that is differentiated.

    Attributes:
        value: float32 scalar, that of the whole batch, without a loss scale; of several losses a
            dict of scalars.
        function: computes it at other parameters: on the same batch, with the same random keys.
    """

    value: Any
    function: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class _PerLoss:
    """The values of several losses; a leaf, which no mask for parameters applies to."""

    values: Mapping[str, Any]


def arguments(objective: Objective, grads: Any, state: TrainState) -> dict[str, Any]:
    """Returns the extra arguments that an optimizer in this state is given, by optax's names.

    `value`, `grad` and `value_fn` go to all: optax drops them where they are not wanted. Other
    names go only to those that are known to want them, because line searches refuse them.
    """
    value, function = objective.value, objective.function
    if contains_state(state.opt_state, contrib.SAMState):  # Refuses all others.
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
    def one(params: Any) -> Any:
        value = function(params)
        if isinstance(value, Mapping):
            raise UserError(
                f'{_WHERE}: optax.contrib:sam with opaque_mode computes gradients of one loss, and '
                f'the task returns {", ".join(value)}. Leave opaque_mode out'
            )
        return value

    return jax.grad(one)(params)


def _named(loss: Any, name: str) -> Any:
    """Returns one of several losses; a task may have this one only."""
    return loss[name] if isinstance(loss, Mapping) else loss


def bind_loss(tx: optax.GradientTransformation, name: str | None) -> optax.GradientTransformation:
    """Returns an optimizer that is given the value of one of several losses, and its function."""
    if name is None:
        return tx
    inner = optax.with_extra_args_support(tx)

    def pick(argument: str, given: Any) -> Any:
        if isinstance(given, _PerLoss):
            return given.values[name]
        if argument in ('value_fn', 'obj_fn'):
            return lambda params: _named(given(params), name)
        return given

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        mine = {argument: pick(argument, given) for argument, given in more.items()}
        return inner.update(updates, state, params, **mine)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def needs_extra_arguments(losses: Sequence[str], opt_state: Any) -> bool:
    """Whether an optimizer takes other arguments than most, which `arguments` has.

    Args:
        losses: names of those that drive some parameters.
        opt_state: the optimizer's state, or its shapes.
    """
    return losses != (ONLY_LOSS,) or contains_state(
        opt_state, (contrib.SAMState, contrib.HutchinsonState)
    )


def retry_update(
    error: Exception,
    update: Callable[..., tuple[Any, Any]],
    state: TrainState,
    found: Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Calls an optimizer again, without the arguments that it has refused, or explains its error.

    Args:
        error: that of the first call.
        update: of the optimizer, to be called with extra arguments.
        state: before the update.
        found: extra arguments that the step has.
        given: those that a step of the user's passes, which take precedence.

    Raises:
        UserError: if the optimizer needs more than it is given, or fails within optax.
    """
    try:
        refused = compat.refused_argument(error)
        if refused is None or refused in given or refused not in found:
            raise error
        # Against optax's convention, some take no other extra arguments than their own.
        try:
            return update(**given)
        except TypeError as second:
            if compat.missing_arguments(second) is None:
                raise
            raise UserError(
                f'{_WHERE}: {error}. What takes extra arguments in its update must accept those '
                'of others too (**extra_args): see optax.GradientTransformationExtraArgs'
            ) from second
    except UserError:
        raise
    except Exception as last:
        missing = compat.missing_arguments(last)
        if missing is not None:
            said = _what_is_missing(missing, state, found)
        elif compat.is_of_optax(last):
            said = _failure(last, state)
        else:
            raise
        raise UserError(f'{_WHERE}: {said}') from last


def _failure(error: Exception, state: TrainState) -> str:
    masks = (
        'optax:masked and optax:partition pass grad on to a part of the parameters with '
        'mask_compatible_extra_args=True. '
    )
    text = str(error).rstrip('. ')
    return (
        f'the optimizer failed: {type(error).__name__}: {text}. It is given the gradient of the '
        'batch, its own state, the parameters, and value, grad and value_fn. '
        + masks * contains_state(state.opt_state, optax.MaskedState)
        + 'If it needs something else, call it in a step of your own: config.step'
    )


def _what_is_missing(names: str, state: TrainState, found: Mapping[str, Any]) -> str:
    example = f'ctx.update(state, grads, {re.split(r"[ ,]", names)[0]}=...)'
    if contains_state(state.opt_state, optax.MultiStepsState):
        return (
            f'it needs {names}, which optax:MultiSteps cannot give it: that makes one update of '
            'several batches. Use config.accumulate instead of optax:MultiSteps'
        )
    if contains_state(state.opt_state, contrib.SAMState):
        return (
            f'it needs {names}, and optax.contrib:sam refuses it, which gets the same arguments as '
            'what it is chained with. Leave one of the two out'
        )
    if not found:
        return (
            f'it needs {names}, and config.step does not pass the gradients that ctx.gradients '
            f'returned. Pass it by name: {example}'
        )
    return (
        f'it needs {names}, which the trainer does not compute. Pass it by name in a step of your '
        f'own (config.step): {example}'
    )
