# SPDX-License-Identifier: Apache-2.0
"""Builds the model of `config.model`, in the dtypes of `config.precision`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from trainer.config import objects, targets
from trainer.config.errors import UserError
from trainer.config.sections import PrecisionSection, Sections
from trainer.modules.foreign import refusal_of_class
from trainer.modules.functional import Functional, as_functional
from trainer.modules.precision import AS_IS, Precision

_PATH = 'config.model'


def check_model(node: Any, path: str = _PATH) -> None:
    """Checks that a target makes a model of a supported library.

    Args:
        node: `config.model`, or the model of an evaluation.
        path: where the config has it, for messages.

    Raises:
        UserError: for a model of another library, and for a function of inputs.
    """
    if not isinstance(node, Mapping) or 'target' not in node:
        return
    target = objects.resolve(node['target'], f'{path}.target')
    # First, because arguments of a model of another library would give a misleading error.
    if (reason := refusal_of_class(target)) is not None:
        raise UserError(reason)
    try:
        targets.check(node, path)
    except targets.MissingArgument as error:
        if not inspect.isroutine(target):
            raise
        raise UserError(
            f'{error}. A function named by {path}.target must return the model: it is '
            'called once, with the other keys of the model, not with inputs'
        ) from error


def build_model(
    sections: Sections, changes: Mapping[str, Any] | None = None, path: str = _PATH
) -> Functional:
    """Returns the model's functional interface; an NNX module is created later.

    Args:
        sections: all sections of the config.
        changes: arguments that differ from `config.model`, for an evaluation.
        path: where the config has them, for messages.

    Raises:
        UserError: if the target does not make a model.
    """
    node = merge_arguments(sections.model, changes or {})
    if isinstance(node.get('rngs'), int):
        raise UserError(f'{path}.rngs: remove it; random numbers come from config.seed')
    # An NNX constructor creates parameters, so it is called only when the state is created.
    if targets.takes_argument(node, 'rngs', path):
        module: Any = functools.partial(_with_rngs, node, path)
    else:
        module = targets.instantiate(node, path)
    wanted = sections.precision
    precision = AS_IS
    if wanted is not None:
        precision = Precision(params=wanted.params, compute=wanted.compute, output=wanted.output)
    try:
        return as_functional(module, precision, named=sections.profile is not None)
    except TypeError as error:
        raise UserError(str(error)) from error


def build_loss_scale(precision: PrecisionSection | None) -> float | None:
    """Returns the initial value of the dynamic loss scale, or None if there is none."""
    if precision is None:
        return None
    # Only float16 needs it: bfloat16 has the exponents of float32. 2^16 is the usual initial value.
    if precision.loss_scale is None:
        return 2.0**16 if 'float16' in (precision.params, precision.compute) else None
    return precision.loss_scale or None


def merge_arguments(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a target with some changed, in nested targets too.

    A change with a `target` or `ref` of its own replaces the object that was there.
    """
    merged = dict(node)
    for name, value in changes.items():
        before = merged.get(name)
        merged[name] = value
        if not isinstance(before, Mapping) or not isinstance(value, Mapping):
            continue
        if not {'target', 'ref'} & value.keys():
            merged[name] = merge_arguments(before, value)
    return merged


def _with_rngs(node: Any, path: str, rngs: Any) -> Any:
    return targets.instantiate(node, path, {'rngs': rngs})
