# SPDX-License-Identifier: Apache-2.0
"""The explanation of where in a step values first became non-finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import and_more
from trainer.modules.model_view import param_path
from trainer.modules.recorder import ROOT, is_float, order_records
from trainer.step.finite import all_finite


def explain(
    records: list[Any],
    loss: bool,
    grads: Mapping[str, bool],
    batch: Mapping[str, bool],
    *,
    after: str = '',
) -> str:
    """Describes the first non-finite value of a step.

    Args:
        records: the flags of each call of each module, from a `ModuleRecorder`.
        loss: whether the losses are finite.
        grads: whether the gradient of each parameter is finite, by path.
        batch: whether each field of the batch is finite, by name.
        after: what is not finite after the update, such as 'a parameter is not: w'; '' if unknown.
    """
    # Module outputs come first, then the loss, then the gradients: in the order in which a step
    # computes them, the first non-finite one is the cause.
    calls = order_records(records)
    bad = next((number for number, call in enumerate(calls) if not call.value['output']), None)
    if bad is not None:
        call = calls[bad]
        name = call.name if call.path else f'{ROOT}, the model itself'
        return (
            f'The first module whose output is not finite is {name}, number {bad + 1} of '
            f'{len(calls)} in call order: {_describe_cause(call.value, _list_non_finite(batch))}'
        )
    if not loss:
        return (
            'The output of every module is finite, but the loss is not: check the task'
            f'{_batch_note(_list_non_finite(batch))}. Typical causes: a label that is not '
            'below the number of classes, or the logarithm of 0.'
        )
    # A custom step computes its own gradients, which are not known here.
    if not grads:
        return (
            'The loss and the output of every module are finite, but '
            + (f'after config.step {after}. ' if after else 'the result of config.step is not. ')
            + 'Check its gradients and its update.'
        )
    if wrong := _list_non_finite(grads):
        return (
            'The loss and the output of every module are finite, but the gradients are not: '
            f'{and_more(wrong, 5)}. Look for an operation without a finite derivative at '
            'its input: the square root or norm of zero, or a division masked by `where`.'
        )
    return (
        'The loss and all gradients are finite, but '
        + (f'after the update {after}. ' if after else 'the update is not. ')
        + 'Check the learning rate and the optimizer.'
    )


def _describe_cause(flags: Mapping[str, Any], fields: Sequence[str]) -> str:
    # Parameters before the input: broken ones spoil the output whatever the input is.
    if not flags['variables']:
        return 'its parameters or statistics were already non-finite.'
    if not flags['input']:
        return f'its input was already non-finite{_batch_note(fields)}; its parameters were finite.'
    return 'its input and its parameters were finite.'


def _batch_note(fields: Sequence[str]) -> str:
    return f' (and so is {", ".join(fields)} in the batch)' if fields else ''


def _list_non_finite(flags: Mapping[str, bool]) -> list[str]:
    return [name for name, fine in flags.items() if not fine]


def flags(output: Any, inputs: Any, variables: Any) -> dict[str, jax.Array]:
    """Returns the flags of one module call for `explain`: whether each part is finite."""
    return {
        'output': all_finite(output),
        'input': all_finite(inputs),
        'variables': all_finite(variables),
    }


def finite_by_path(tree: Any) -> dict[str, jax.Array]:
    """Returns, by path, whether all elements of each float leaf are finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {param_path(p): jnp.all(jnp.isfinite(x)) for p, x in leaves if is_float(x)}
