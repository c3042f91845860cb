# SPDX-License-Identifier: Apache-2.0
"""`config.surgery`: operations on weights by key path, before they are matched with the model.

An operation changes a parameter together with its slots in the optimizer: `Rename` moves Adam's
moments with their parameter, `Resize` fills their new entries with zeros. From Python, `operate`
does the same to parameters and an optax state.
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

from trainer.config.errors import UserError, indented_list
from trainer.modules import patterns
from trainer.modules.shapes import describe
from trainer.weights.leaves import (
    HostLeaf,
    Weights,
    flatten,
    from_arrays,
    is_slot,
    key_path,
    read_array,
    read_arrays,
    slots,
    with_key_path,
)

Array = np.ndarray


class Operation(Protocol):
    """One entry of `config.surgery`."""

    def __call__(self, weights: Weights) -> Weights:
        """Returns the new weights, by path.

        Args:
            weights: arrays by key path; must not be changed in place.

        Raises:
            UserError: if the operation applies to nothing.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Renames arrays.

    Attributes:
        pattern: regular expression; it may match a part of a key path.
        replacement: text that replaces a match, as for `re.sub`.
    """

    pattern: str
    replacement: str

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights under their new paths."""
        try:
            named = {
                path: with_key_path(path, re.sub(self.pattern, self.replacement, key_path(path)))
                for path in weights
            }
        except (re.error, IndexError) as error:
            raise UserError(f'config.surgery: {self}: {error}') from error
        if all(old == new for old, new in named.items()):
            raise no_match_error(self, self.pattern, weights)
        new = list(named.values())
        if twice := sorted(path for path in set(new) if new.count(path) > 1):
            raise UserError(
                f'config.surgery: {self}: several arrays get the path\n{indented_list(twice)}'
            )
        return {named[path]: leaf for path, leaf in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """Shortens or extends a dimension: a head for other classes, a larger vocabulary.

    Attributes:
        pattern: regular expression that matches whole key paths.
        size: the new size of the dimension.
        axis: index of the dimension; negative ones count from the end.
        keep: indices of the old entries to keep, in this order; None keeps the first ones.
        fill: value of new entries, or 'mean' for that of the old ones; always 0 for the slots of an
            optimizer.
    """

    pattern: str
    size: int
    axis: int = -1
    keep: tuple[int, ...] | None = None
    fill: float | Literal['mean'] = 0.0

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the dimension resized."""
        return _edit_matching(self, self.pattern, weights, self._resize)

    def _resize(self, array: Array, slot: bool) -> Array:
        length = array.shape[self.axis]
        keep = range(min(length, self.size)) if self.keep is None else self.keep
        old = np.take(array, np.asarray(keep, int), self.axis)
        if old.shape[self.axis] > self.size:
            raise ValueError(f'keep has {old.shape[self.axis]} entries, more than size={self.size}')
        shape = list(array.shape)
        shape[self.axis] = self.size - old.shape[self.axis]
        # New entries have no history of gradients: their slots start at zero as in a new optimizer.
        fill = 0.0 if slot else self.fill
        value = array.mean(self.axis, keepdims=True) if fill == 'mean' else fill
        return np.concatenate([old, np.broadcast_to(value, shape).astype(array.dtype)], self.axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolate:
    """Resamples position embeddings (..., positions, width) to another number of positions.

    Attributes:
        pattern: regular expression that matches whole key paths.
        size: the new number of positions, or (height, width) of the new grid of patches.
        old_size: (height, width) of the old grid; by default it is square.
        extra: number of leading positions outside of the grid, such as a class token; they stay.
        method: method of `jax.image.resize`; always 'linear' for the slots of an optimizer.
    """

    pattern: str
    size: int | tuple[int, int]
    old_size: tuple[int, int] | None = None
    extra: int = 0
    method: str = 'cubic'

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the positions resampled."""
        return _edit_matching(self, self.pattern, weights, self._resample)

    def _resample(self, array: Array, slot: bool) -> Array:
        if array.ndim < 2:
            raise ValueError('expected an array (..., positions, width)')
        if not 0 <= self.extra < array.shape[-2]:
            raise ValueError(f'it has only {array.shape[-2]} positions, and extra={self.extra}')
        kept, table = array[..., : self.extra, :], array[..., self.extra :, :]
        old = self._old_grid(table.shape[-2])
        new = (self.size,) if isinstance(self.size, int) else tuple(self.size)
        leading, width = table.shape[:-2], table.shape[-1]
        grid = jnp.asarray(table, jnp.float32).reshape(*leading, *old, width)
        # Cubic interpolation overshoots, and a negative second moment would make the update NaN.
        method = 'linear' if slot else self.method
        grid = jax.image.resize(grid, (*leading, *new, width), method)
        table = np.asarray(grid).reshape(*leading, math.prod(new), width).astype(array.dtype)
        return np.concatenate([kept, table], -2)

    def _old_grid(self, positions: int) -> tuple[int, ...]:
        if isinstance(self.size, int):
            return (positions,)
        old = self.old_size or (math.isqrt(positions),) * 2
        if math.prod(old) != positions:
            raise ValueError(f'{positions} positions are not a grid {old}: set old_size and extra')
        return old


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """Applies a function to arrays; the slots of an optimizer do not change.

    Attributes:
        pattern: regular expression that matches whole key paths.
        function: takes and returns an array.
    """

    pattern: str
    function: Callable[[Any], Any]

    def __call__(self, weights: Weights) -> Weights:
        """Returns the weights with the results of the function."""

        def edit(array: Array, slot: bool) -> Array:
            return array if slot else np.asarray(self.function(array))

        return _edit_matching(self, self.pattern, weights, edit)


def apply_operations(operations: Sequence[Operation], weights: Weights) -> Weights:
    """Returns the weights after the operations, in order.

    Raises:
        UserError: naming an operation that is not callable, applies to nothing, or does not return
            weights.
    """
    for index, operation in enumerate(operations):
        if not callable(operation):
            kind = type(operation).__name__
            raise UserError(
                f'config.surgery[{index}]: expected an operation of trainer.weights (Rename, '
                f'Resize, Stack, ...) or a function, got a {kind}'
            )
        weights = operation(weights)
        if not isinstance(weights, Mapping):
            kind = type(weights).__name__
            raise UserError(
                f'config.surgery: {operation} returned {kind}; expected weights by path'
            )
        _check_nesting(operation, weights)
    return weights


def operate(
    operations: Sequence[Operation],
    params: Any,
    opt_state: Any = None,
    tx: optax.GradientTransformation | None = None,
) -> tuple[Any, Any]:
    """Returns parameters and optimizer state after the operations, as trees of numpy arrays.

    The state has the structure of `tx.init(new_params)`, including masked parameters.

    Args:
        operations: operations of `config.surgery`, in order.
        params: nested dict.
        opt_state: the state of `tx` for these parameters, or None.
        tx: the optimizer; required with `opt_state`.

    Raises:
        UserError: if the state does not fit the new parameters.
    """
    if opt_state is not None and tx is None:
        raise UserError('operate: opt_state needs the optimizer that created it, tx=...')
    old_slots = slots(flatten(opt_state, 'opt_state/'), flatten(params))
    weights = apply_operations(operations, from_arrays(params, 'params/') | from_arrays(old_slots))
    arrays = {key_path(p): x for p, x in read_arrays(weights).items() if p.startswith('params/')}
    new = traverse_util.unflatten_dict(arrays, sep='/')
    if opt_state is None or tx is None:
        return new, None
    return new, _rebuild_state(tx, new, opt_state, weights)


def _rebuild_state(
    tx: optax.GradientTransformation, params: Any, opt_state: Any, weights: Weights
) -> Any:
    """Returns the state of new parameters: slots from the weights, other leaves unchanged."""
    # Only the structure and the shapes: operations may have moved slots to new parameters.
    wanted, old = jax.eval_shape(tx.init, params), flatten(opt_state, 'opt_state/')
    goal = flatten(wanted, 'opt_state/')
    names = {path: name for name, path in slots({p: p for p in goal}, flatten(params)).items()}
    leaves = {
        path: read_array(weights[names[path]]) if names.get(path) in weights else old.get(path)
        for path in goal
    }
    other = [
        f'{path}: got {describe(leaves[path])}, the new parameters need {describe(x)}'
        for path, x in goal.items()
        if getattr(leaves[path], 'shape', None) != x.shape
    ]
    if other:
        raise UserError(
            f'the optimizer state does not fit the new parameters:\n{indented_list(other)}\n'
            'Start with a new state, tx.init(params).'
        )
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves.values())


def _check_nesting(operation: Operation, weights: Weights) -> None:
    for path in weights:
        keys = path.split('/')
        above = next((p for i in range(2, len(keys)) if (p := '/'.join(keys[:i])) in weights), None)
        if above is not None:
            raise UserError(
                f'config.surgery: {operation} creates {path} below {above}, which is an array'
            )


def _edit_matching(
    operation: Operation, pattern: str, weights: Weights, edit: Callable[[Array, bool], Array]
) -> Weights:
    """Returns the weights, edited where the whole key path matches the pattern.

    Args:
        operation: operation of `config.surgery`, which messages name.
        pattern: regular expression.
        weights: arrays by key path.
        edit: takes an array and whether it is a slot of an optimizer, and returns the new array.
    """
    where, paths = f'config.surgery: {operation}', _key_paths(weights)
    patterns.check_used([pattern], paths, where, 'no array')
    matching = [path for path in weights if patterns.matches([pattern], key_path(path))]
    new = dict(weights)
    for path in matching:
        array = read_array(weights[path])
        try:
            edited = edit(array, is_slot(path))
            if edited is not array:
                _check_result(edited, path, weights)
        except Exception as error:  # `edit` may call a function of the user.
            where = f'{operation} on {path} {list(array.shape)}'
            kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
            raise UserError(f'config.surgery: {where}: {kind}{error}') from error
        new[path] = HostLeaf(edited)
    return new


def _check_result(array: Array, path: str, weights: Weights) -> None:
    if array.dtype.kind in 'OSU':
        raise ValueError(f'expected an array of numbers, got {array!r}')
    # A factored slot (Adafactor) has other dimensions than its parameter: an edit of the same axis
    # would change another one.
    parameter = weights.get(f'params/{key_path(path)}')
    if is_slot(path) and parameter is not None and parameter.shape != weights[path].shape:
        raise ValueError(
            f'a slot whose shape differs from that of its parameter, {list(parameter.shape)}, '
            'cannot be edited: start with a new optimizer state'
        )


def no_match_error(operation: Operation, pattern: str, weights: Weights) -> UserError:
    """Returns the error of an operation whose pattern, for parts of paths, matches none of them."""
    where, paths = f'config.surgery: {operation}', _key_paths(weights)
    return patterns.no_match_error(where, [pattern], paths, 'no array', is_whole=False)


def _key_paths(weights: Weights) -> list[str]:
    # Slots have the key paths of their parameters, and a count beside the slots has none.
    return [path for path in dict.fromkeys(map(key_path, weights)) if path]
