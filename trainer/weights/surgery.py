# SPDX-License-Identifier: Apache-2.0
"""`config.surgery`: operations on weights by path, before they must fit the model.

An operation acts on everything at a place, on the parameter and on the slots that an optimizer
holds for it: `Rename` moves Adam's moments with their parameter, `Resize` starts new rows at zero
there. From Python, `operate` does the same to parameters and an optax state.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from trainer.config.errors import UserError
from trainer.config.text import indented_list
from trainer.modules.shapes import describe
from trainer.weights.leaves import (
    HostLeaf,
    Weights,
    flat,
    host,
    hosts,
    is_slot,
    of_arrays,
    place,
    replace_place,
    slots,
)

Array = np.ndarray


class Operation(Protocol):
    """One entry of `config.surgery`."""

    def __call__(self, weights: Weights) -> Weights:
        """Returns other weights; raises a UserError if there is nothing that it applies to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Gives arrays other paths.

    Attributes:
        pattern: regular expression; it may match a part of a path.
        replacement: as `re.sub` takes it.
    """

    pattern: str
    replacement: str

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights under their new paths."""
        try:
            named = {
                path: replace_place(path, re.sub(self.pattern, self.replacement, place(path)))
                for path in weights
            }
        except (re.error, IndexError) as error:
            raise UserError(f'config.surgery: {self}: {error}') from error
        if all(old == new for old, new in named.items()):
            raise nothing(self, weights)
        new = list(named.values())
        if twice := sorted(path for path in set(new) if new.count(path) > 1):
            raise UserError(
                f'config.surgery: {self} gives one path to several:\n{indented_list(twice)}'
            )
        return {named[path]: leaf for path, leaf in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """Cuts a dimension, or makes it longer: a head for other classes, a larger vocabulary.

    Attributes:
        pattern: of whole paths.
        size: of the dimension after it.
        axis: which dimension; negative ones count from the end.
        keep: which of the old entries stay, in this order; None keeps the first ones.
        fill: value of new entries, or 'mean' of the old ones; slots of an optimizer begin at zero.
    """

    pattern: str
    size: int
    axis: int = -1
    keep: tuple[int, ...] | None = None
    fill: float | Literal['mean'] = 0.0

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the dimension in its new size."""
        return _edited(self, self.pattern, weights, self._resized)

    def _resized(self, array: Array, slot: bool) -> Array:
        length = array.shape[self.axis]
        keep = range(min(length, self.size)) if self.keep is None else self.keep
        old = np.take(array, np.asarray(keep, int), self.axis)
        if old.shape[self.axis] > self.size:
            raise ValueError(f'{old.shape[self.axis]} entries are kept and only {self.size} fit')
        shape = list(array.shape)
        shape[self.axis] = self.size - old.shape[self.axis]
        fill = 0.0 if slot else self.fill
        value = array.mean(self.axis, keepdims=True) if fill == 'mean' else fill
        return np.concatenate([old, np.broadcast_to(value, shape).astype(array.dtype)], self.axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate:
    """Resamples position embeddings (..., positions, width) to another number of positions.

    Attributes:
        pattern: of whole paths.
        size: positions of a sequence, or (height, width) of a grid of patches.
        old_size: (height, width) of the old grid; by default it is square.
        extra: leading positions that are none of the grid, such as a class token; they stay.
        method: of `jax.image.resize`; the slots of an optimizer are resampled linearly, or a second
            moment might fall below zero.
    """

    pattern: str
    size: int | tuple[int, int]
    old_size: tuple[int, int] | None = None
    extra: int = 0
    method: str = 'cubic'

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with their new positions."""
        return _edited(self, self.pattern, weights, self._resampled)

    def _resampled(self, array: Array, slot: bool) -> Array:
        if array.ndim < 2:
            raise ValueError('it is no table of positions and widths')
        if not 0 <= self.extra < array.shape[-2]:
            raise ValueError(f'it has no positions besides {self.extra} extra ones')
        kept, table = array[..., : self.extra, :], array[..., self.extra :, :]
        old = self._old_grid(table.shape[-2])
        new = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        leading, width = table.shape[:-2], table.shape[-1]
        grid = jnp.asarray(table, jnp.float32).reshape(*leading, *old, width)
        method = 'linear' if slot else self.method
        grid = jax.image.resize(grid, (*leading, *new, width), method)
        table = np.asarray(grid).reshape(*leading, math.prod(new), width).astype(array.dtype)
        return np.concatenate([kept, table], -2)

    def _old_grid(self, positions: int) -> tuple[int, ...]:
        if isinstance(self.size, int):
            return (positions,)
        old = self.old_size or (math.isqrt(positions),) * 2
        if math.prod(old) != positions:
            raise ValueError(f'{positions} positions are no grid of {old}: set old_size and extra')
        return old


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """Replaces arrays by what a function makes of them; the slots of an optimizer stay.

    Attributes:
        pattern: of whole paths.
        function: takes and returns an array.
    """

    pattern: str
    function: Callable[[Any], Any]

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the function's results."""

        def edit(array: Array, slot: bool) -> Array:
            return array if slot else np.asarray(self.function(array))

        return _edited(self, self.pattern, weights, edit)


def operated(operations: Sequence[Operation], weights: Weights) -> Weights:
    """Returns the weights after the operations, in order.

    Raises:
        UserError: naming an operation that is none, applies to nothing, or makes no weights.
    """
    for index, operation in enumerate(operations):
        if not callable(operation):
            kind = type(operation).__name__
            raise UserError(
                f'config.surgery[{index}] is no operation on weights but a {kind}: expected one of '
                'trainer.weights (Rename, Resize, Stack, ...), or a function of yours'
            )
        weights = operation(weights)
        if not isinstance(weights, Mapping):
            kind = type(weights).__name__
            raise UserError(f'config.surgery: {operation} returns {kind}, not the weights by path')
        _check_nesting(operation, weights)
    return weights


def operate(
    operations: Sequence[Operation],
    params: Any,
    opt_state: Any = None,
    tx: optax.GradientTransformation | None = None,
) -> tuple[Any, Any]:
    """Returns parameters and optimizer state after the operations, as trees of numpy arrays.

    The state has the structure that the optimizer gives it for the new parameters, masked ones
    included.

    Args:
        operations: in order.
        params: nested dict.
        opt_state: made by `tx` for these parameters, or None.
        tx: the optimizer; needed with its state.

    Raises:
        UserError: if something does not fit the state of the new parameters.
    """
    if opt_state is not None and tx is None:
        raise UserError('operate: the optimizer `tx` that made opt_state goes with it')
    held = slots(flat(opt_state, 'opt_state/'), flat(params))
    weights = operated(operations, of_arrays(params, 'params/') | of_arrays(held))
    arrays = {place(p): x for p, x in hosts(weights).items() if p.startswith('params/')}
    new = traverse_util.unflatten_dict(arrays, sep='/')
    if opt_state is None or tx is None:
        return new, None
    return new, _state_of(tx, new, opt_state, weights)


def _state_of(
    tx: optax.GradientTransformation, params: Any, opt_state: Any, weights: Weights
) -> Any:
    """Returns the state of new parameters: slots of the weights, the rest as it was."""
    wanted, old = jax.eval_shape(tx.init, params), flat(opt_state, 'opt_state/')
    goal = flat(wanted, 'opt_state/')
    names = {path: name for name, path in slots({p: p for p in goal}, flat(params)).items()}
    found = {
        path: host(weights[names[path]]) if names.get(path) in weights else old.get(path)
        for path in goal
    }
    other = [
        f'{path}: {describe(found[path])} there, {describe(x)} for the new parameters'
        for path, x in goal.items()
        if getattr(found[path], 'shape', None) != x.shape
    ]
    if other:
        raise UserError(
            f'the state of the optimizer does not go with its parameters:\n{indented_list(other)}\n'
            'Begin with a new one, tx.init(params).'
        )
    return jax.tree.unflatten(jax.tree.structure(wanted), found.values())


def _check_nesting(operation: Operation, weights: Weights) -> None:
    for path in weights:
        keys = path.split('/')
        above = next((p for i in range(2, len(keys)) if (p := '/'.join(keys[:i])) in weights), None)
        if above is not None:
            raise UserError(
                f'config.surgery: {operation} makes {path}, and {above} is an array, below which '
                'nothing can be'
            )


def _edited(
    operation: Operation, pattern: str, weights: Weights, edit: Callable[[Array, bool], Array]
) -> Weights:
    """Returns the weights with those edited whose place matches the pattern."""
    try:
        matching = [path for path in weights if re.fullmatch(pattern, place(path))]
    except re.error as error:
        raise UserError(f'config.surgery: {operation}: {error}') from error
    if not matching:
        raise nothing(operation, weights)
    new = dict(weights)
    for path in matching:
        array = host(weights[path])
        try:
            made = edit(array, is_slot(path))
            if made is not array:
                _check_edited(made, path, weights)
        except Exception as error:  # It may come from a function of the user's.
            where = f'{operation} on {path} {list(array.shape)}'
            kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
            raise UserError(f'config.surgery: {where}: {kind}{error}') from error
        new[path] = HostLeaf(made)
    return new


def _check_edited(array: Array, path: str, weights: Weights) -> None:
    if array.dtype.kind in 'OSU':
        raise ValueError(f'the result is no array of numbers but {array!r}')
    parameter = weights.get(f'params/{place(path)}')
    if is_slot(path) and parameter is not None and parameter.shape != weights[path].shape:
        raise ValueError(
            f'its parameter has the shape {list(parameter.shape)}, and what becomes of a slot of '
            'another shape is not known: start with a new state of the optimizer'
        )


def nothing(operation: Operation, weights: Weights) -> UserError:
    """Returns the error of an operation that has nothing to do, with the paths that there are."""
    paths = dict.fromkeys(place(path) for path in weights)
    return UserError(
        f'config.surgery: {operation} applies to nothing. There is\n'
        f'{indented_list(filter(None, paths))}'
    )
