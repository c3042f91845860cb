# SPDX-License-Identifier: Apache-2.0
"""Checks whether a model computes in the dtype of `config.precision.compute`.

One float32 array (a constant, a softmax whose result is not cast back) promotes everything after
it, which otherwise shows only in the time of a step.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax.numpy as jnp

from trainer.inspect.module_table import module_of
from trainer.modules.functional import Functional, RecordedModel
from trainer.modules.precision import is_in_model_call
from trainer.modules.recorder import ROOT, ModuleRecorder
from trainer.observe import flops
from trainer.step.programs import Programs

_log = logging.getLogger('trainer')

# Share of a model's operations in a wider dtype from which on a run warns. Matrix units are 8 to 16
# times faster in half precision than in float32: a tenth takes about as long as all the rest.
# Intended float32 (a router, position angles, a head of a few classes) is usually far below that;
# promotion affects everything after its cause, and is usually far above.
_SHARE = 0.1


class Place(NamedTuple):
    """Where an equation belongs.

    Attributes:
        called: whether to the model, and not to the task, the optimizer, a norm or a metric.
        module: path of the innermost module, if a recorder names them.
        dtype: the widest of the operands of a product, '' for another equation.
    """

    called: bool = False
    module: str = ''
    dtype: str = ''


def warn_of_other_dtypes(programs: Programs, model: Functional) -> None:
    """Warns if much of the train step is not computed in `config.precision.compute`.

    It reads the jaxpr of the step, which takes milliseconds; the step is traced a second time only
    to name the module.

    Args:
        programs: of the training.
        model: their model.
    """
    compute = model.precision.compute
    if compute is None or jnp.dtype(compute).itemsize >= 4:
        return
    text = describe(programs, model, programs.step.jaxpr())
    if text is not None:
        _log.warning('%s', text)


def describe(programs: Programs, model: Functional, jaxpr: Any) -> str | None:
    """Returns the warning for a step, None if it computes in the requested dtype.

    Args:
        programs: of the training.
        model: their model, with a `precision.compute`.
        jaxpr: of the step.
    """
    asked = jnp.dtype(model.precision.compute)
    operations = in_model(jaxpr)
    wide = wider(operations, asked)
    share = sum(wide.values()) / max(1.0, sum(operations.values()))
    if share < _SHARE:
        return None
    named = wider(in_model(programs.jaxpr(RecordedModel(model, ModuleRecorder()))), asked)
    first = next(iter(named or wide))
    return (
        f"config.precision.compute={asked.name}, but {100 * share:.0f} % of the model's operations "
        f'(matrix products and convolutions) are {first.dtype}, first in {first.module or ROOT}. '
        f'A {first.dtype} array or module there or earlier promotes everything after it to '
        f'{first.dtype}; cast its result back, as in y.astype(x.dtype)'
    )


def in_model(jaxpr: Any) -> dict[Place, float]:
    """Returns the floating-point operations of a model's products, in order of occurrence.

    Args:
        jaxpr: of a step or a part of it; the model has a `Precision` with `compute`.
    """
    found = flops.by_place(jaxpr, _place, Place())
    return {place: operations for place, operations in found.items() if place.called}


def wider(operations: dict[Place, float], dtype: Any) -> dict[Place, float]:
    """Returns the operations in a wider dtype."""
    size = jnp.dtype(dtype).itemsize
    return {place: n for place, n in operations.items() if jnp.dtype(place.dtype).itemsize > size}


def _place(equation: Any, around: Place) -> Place:
    called, module = around.called or is_in_model_call(equation), module_of(equation, around.module)
    if equation.primitive.name not in flops.PRODUCTS:
        return Place(called, module)
    # There are no complex halves, and integers are intended.
    dtypes = [operand.aval.dtype for operand in equation.invars]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    if len(floats) < len(dtypes):
        return Place()
    # If the two differ, the compiler converts the narrower one.
    return Place(called, module, max(floats, key=lambda dtype: dtype.itemsize).name)
