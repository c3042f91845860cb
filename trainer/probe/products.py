# SPDX-License-Identifier: Apache-2.0
"""Whether a model computes in the dtype that `config.precision.compute` asks for.

One array of float32 (a constant, a softmax whose result is not cast back) makes float32 of all that
follows, and nothing shows it but the time that a step takes.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax.numpy as jnp

from trainer.modules import Functional
from trainer.modules.precision import in_call
from trainer.modules.tap import ROOT, Tap, Tapped
from trainer.plan import flops
from trainer.probe.modules import module_of
from trainer.step.program import Programs

_log = logging.getLogger('trainer')

# Share of a model's operations in a wider dtype from which on a run says so. Matrix units do 8 to
# 16 times as many operations in a half as in float32: a tenth takes about as long as all the rest.
# What is in float32 on purpose (a router, angles of positions, a head of some classes) is mostly
# far below that; promotion reaches everything after its cause, and is mostly far above.
_SHARE = 0.1


class Place(NamedTuple):
    """Where an equation stands.

    Attributes:
        called: whether it is of the model: not of the task, the optimizer, a norm or a metric.
        module: path of the innermost module, where a tap names them.
        dtype: the widest of the operands of a product, '' for another equation.
    """

    called: bool = False
    module: str = ''
    dtype: str = ''


def warn_of_other_dtypes(programs: Programs, model: Functional) -> None:
    """Says it if much of the train step is not computed in the half that is asked for.

    What JAX has traced of the step anyway is read, which takes milliseconds; it is traced a second
    time only to name the module.

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
    """Returns what there is to say of a step, None if it computes in what is asked for.

    Args:
        programs: of the training.
        model: their model, of a `precision.compute`.
        jaxpr: what JAX traces of the step.
    """
    asked = jnp.dtype(model.precision.compute)
    operations = in_model(jaxpr)
    wide = wider(operations, asked)
    share = sum(wide.values()) / max(1.0, sum(operations.values()))
    if share < _SHARE:
        return None
    named = wider(in_model(programs.jaxpr(Tapped(model, Tap()))), asked)
    first = next(iter(named or wide))
    return (
        f"config.precision.compute={asked.name}, but {100 * share:.0f} % of the model's operations "
        f'(matrix products and convolutions) are {first.dtype}, first in {first.module or ROOT}. '
        f'An array or a module of {first.dtype} there or before it makes what follows '
        f'{first.dtype}; cast its result back, as in y.astype(x.dtype)'
    )


def in_model(jaxpr: Any) -> dict[Place, float]:
    """Returns the floating-point operations of a model's products, in the order of the places.

    Args:
        jaxpr: of a step or a part of it; the model has a `Precision` with `compute`.
    """
    found = flops.by_place(jaxpr, _place, Place())
    return {place: operations for place, operations in found.items() if place.called}


def wider(operations: dict[Place, float], dtype: Any) -> dict[Place, float]:
    """Returns what of these is in a wider dtype."""
    size = jnp.dtype(dtype).itemsize
    return {place: n for place, n in operations.items() if jnp.dtype(place.dtype).itemsize > size}


def _place(equation: Any, around: Place) -> Place:
    called, module = around.called or in_call(equation), module_of(equation, around.module)
    if equation.primitive.name not in flops.PRODUCTS:
        return Place(called, module)
    # Complex ones have no half, and integers are as they are meant.
    dtypes = [operand.aval.dtype for operand in equation.invars]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    if len(floats) < len(dtypes):
        return Place()
    # Of two that differ the compiler converts the narrower one.
    return Place(called, module, max(floats, key=lambda dtype: dtype.itemsize).name)
