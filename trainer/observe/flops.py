# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a function, counted in its jaxpr."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr

Key = TypeVar('Key', bound=Hashable)

# The primitives that are counted.
PRODUCTS = ('dot_general', 'conv_general_dilated')


def count(jaxpr: Any) -> float:
    """Returns the operations of all matrix products and convolutions, 2 per multiply-add.

    The body of a scan counts once per iteration, that of a `while_loop` once, and of the branches
    of a `cond` only the largest. Recomputation, as under `remat`, counts again.

    Args:
        jaxpr: a jaxpr, closed or not, of whole arrays rather than shards.
    """
    return sum(count_by_key(jaxpr, lambda equation, around: '', '').values())


def count_by_key(jaxpr: Any, key_of: Callable[[Any, Key], Key], outer: Key) -> dict[Key, float]:
    """Returns the operations that `count` sums up, by key, in order of first occurrence.

    Args:
        jaxpr: see `count`.
        key_of: returns the key of an equation, given the equation and the key of the enclosing one.
        outer: the key of the whole jaxpr.
    """
    totals: dict[Key, float] = collections.defaultdict(float)
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        name, key = equation.primitive.name, key_of(equation, outer)
        inner = [count_by_key(each, key_of, key) for each in _inner_jaxprs(equation.params)]
        if name == 'dot_general':
            inner = [{key: _count_product(equation)}]
        elif name == 'conv_general_dilated':
            inner = [{key: _count_convolution(equation)}]
        elif name == 'cond':
            # Only one branch runs: the largest gives an upper bound.
            inner = [max(inner, key=lambda branch: sum(branch.values()), default={})]
        # The number of iterations of a `while_loop` is not in the jaxpr.
        times = equation.params['length'] if name == 'scan' else 1
        for each in inner:
            for inner_key, operations in each.items():
                totals[inner_key] += times * operations
    return totals


def _count_product(equation: Any) -> float:
    (contracted, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _count_convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
    # Each output value is a dot product with the kernel of one output channel.
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / max(1, outputs)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters: loop bodies, branches, called functions."""
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (Jaxpr, ClosedJaxpr)):
                yield each
