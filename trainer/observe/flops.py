# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a function, counted in what JAX has traced."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr

Place = TypeVar('Place', bound=Hashable)

# The primitives that are counted.
PRODUCTS = ('dot_general', 'conv_general_dilated')


def count(jaxpr: Any) -> float:
    """Returns the operations of all matrix products and convolutions, 2 for each product.

    The body of a scan counts as often as it runs, that of a `while_loop` once, and of the branches
    of a `cond` the largest one. What is computed twice, as under `remat`, counts twice.

    Args:
        jaxpr: a jaxpr, closed or not, of whole arrays and not of a device's part.
    """
    return sum(by_place(jaxpr, lambda equation, around: '', '').values())


def by_place(jaxpr: Any, place: Callable[[Any, Place], Place], around: Place) -> dict[Place, float]:
    """Returns the operations that `count` sums up, by place, in order of first occurrence.

    Args:
        jaxpr: see `count`.
        place: the place of an equation, given the equation and the place of the enclosing one.
        around: the place of the whole.
    """
    totals: dict[Place, float] = collections.defaultdict(float)
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        name, here = equation.primitive.name, place(equation, around)
        inner = [by_place(each, place, here) for each in _inside(equation.params)]
        if name == 'dot_general':
            inner = [{here: _product(equation)}]
        elif name == 'conv_general_dilated':
            inner = [{here: _convolution(equation)}]
        elif name == 'cond':
            inner = [max(inner, key=lambda branch: sum(branch.values()), default={})]
        times = equation.params['length'] if name == 'scan' else 1
        for where, operations in ((k, v) for each in inner for k, v in each.items()):
            totals[where] += times * operations
    return totals


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
    # Each output value is a product with the kernel's part of one output channel.
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / max(1, outputs)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (Jaxpr, ClosedJaxpr)):
                yield each
