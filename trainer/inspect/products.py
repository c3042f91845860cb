# SPDX-License-Identifier: Apache-2.0
"""Warns if a model does not compute in the dtype of `config.precision.compute`.

A single float32 array (a constant, a softmax whose result is not cast back) promotes everything
after it, which otherwise shows only in the step time.
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

# A run warns if a larger share of the model's operations is in a wider dtype. Matrix units are 8 to
# 16 times faster in half precision than in float32, so a tenth takes about as long as the rest.
# Intended float32 (a router, position angles, a head of a few classes) is usually far below this
# share; promotion affects everything after its cause, and is usually far above.
_MAX_SHARE = 0.1


class ProductKey(NamedTuple):
    """The key by which operations are counted.

    Attributes:
        in_model: whether the model computes it, rather than the task, the optimizer or a metric.
        module: path of the innermost module, if traced with a `ModuleRecorder`.
        dtype: the widest dtype of a product's operands, '' for other equations.
    """

    in_model: bool = False
    module: str = ''
    dtype: str = ''


def warn_of_other_dtypes(programs: Programs, model: Functional) -> None:
    """Warns if much of the train step is not computed in `config.precision.compute`.

    Reading the jaxpr of the step takes milliseconds. The step is traced a second time only if there
    is something to warn of, to name the module.

    Args:
        programs: the training programs.
        model: the model that they train.
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
        programs: the training programs.
        model: their model, with a `precision.compute`.
        jaxpr: jaxpr of the step.
    """
    requested = jnp.dtype(model.precision.compute)
    operations = model_operations(jaxpr)
    wider = select_wider(operations, requested)
    share = sum(wider.values()) / max(1.0, sum(operations.values()))
    if share < _MAX_SHARE:
        return None
    by_module = select_wider(
        model_operations(programs.jaxpr(RecordedModel(model, ModuleRecorder()))), requested
    )
    first = next(iter(by_module or wider))
    return (
        f'config.precision.compute={requested.name}, but {100 * share:.0f} % of the '
        f"model's operations (matrix products and convolutions) are {first.dtype}, first in "
        f'{first.module or ROOT}. '
        f'A {first.dtype} array or module there or earlier promotes everything after it to '
        f'{first.dtype}; cast its result back, as in y.astype(x.dtype)'
    )


def model_operations(jaxpr: Any) -> dict[ProductKey, float]:
    """Returns the operations of the model's products and convolutions, in order of occurrence.

    Args:
        jaxpr: jaxpr of a step or a part of it; the model has a `Precision` with `compute`.
    """
    operations = flops.count_by_key(jaxpr, _key_of, ProductKey())
    return {key: n for key, n in operations.items() if key.in_model}


def select_wider(operations: dict[ProductKey, float], dtype: Any) -> dict[ProductKey, float]:
    """Returns the operations in a dtype that is wider than this one."""
    size = jnp.dtype(dtype).itemsize
    return {key: n for key, n in operations.items() if jnp.dtype(key.dtype).itemsize > size}


def _key_of(equation: Any, outer: ProductKey) -> ProductKey:
    in_model = outer.in_model or is_in_model_call(equation)
    module = module_of(equation, outer.module)
    if equation.primitive.name not in flops.PRODUCTS:
        return ProductKey(in_model, module)
    # Products of complex numbers or integers are left out: complex dtypes have no half precision,
    # and integers are intended.
    dtypes = [operand.aval.dtype for operand in equation.invars]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    if len(floats) < len(dtypes):
        return ProductKey()
    # If the operands differ, the compiler converts the narrower one.
    return ProductKey(in_model, module, max(floats, key=lambda dtype: dtype.itemsize).name)
