# SPDX-License-Identifier: Apache-2.0
"""The first state of a run that does not start from nothing."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.config.text import indented_list
from trainer.ensemble import step
from trainer.modules.shapes import describe
from trainer.step.state import TrainState
from trainer.weights import flax_layout
from trainer.weights import leaves as lib
from trainer.weights.init_from import TENSORS, InitFrom
from trainer.weights.leaves import Weights
from trainer.weights.surgery import Operation, operated

_log = logging.getLogger('trainer')
_FRESH = 'what config.surgery makes of the fresh weights'
# PyTorch counts batches, Flax has no use for it.
_NEVER_WANTED = re.compile(r'.*/num_batches_tracked')


def start(
    state: TrainState,
    init_from: InitFrom | None,
    surgery: Sequence[Operation],
    restarted: Callable[[TrainState], TrainState],
    *,
    members: bool = False,
) -> TrainState:
    """Returns the first state of a run: `state` with the weights that the config asks for.

    Args:
        state: freshly made; its buffers are given up.
        init_from: where weights come from; None leaves those of the state, for surgery.
        surgery: what is done to them, in order, before they must fit the model.
        restarted: makes optimizer state and moving average anew for other parameters; it may donate
            its argument.
        members: whether the state is an ensemble's. Each member gets the same weights, and keeps
            of its own what is not loaded.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    if init_from is None and not surgery:
        return state
    fresh = _variables(state)
    wanted = {path: _shape_of(x) for path, x in fresh.items()}
    if init_from is not None and init_from.optimizer:
        wanted.update({path: _shape_of(x) for path, x in _slots(state).items()})
    goal = jax.tree.map(step.member_spec, wanted) if members else wanted
    if init_from is None:
        weights = lib.of_arrays(fresh)
    else:
        init_from.check_patterns(goal)
        weights = init_from.read({path: x.shape for path, x in goal.items()})
    weights = operated(surgery, weights)
    weights = lib.in_slots_of(flax_layout.of_model(weights, goal), goal)
    fitting = matched(weights, goal, init_from or InitFrom(path=_FRESH))
    for path in fitting.keys() & fresh.keys():
        fresh[path].delete()  # Or the devices would hold all of it twice.
    loaded = lib.load(fitting, goal)
    if members:
        loaded = {path: step.repeat_for_members(x, wanted[path]) for path, x in loaded.items()}
    state = restarted(_with_variables(state, loaded))
    return _with_slots(state, loaded)


def matched(weights: Weights, goal: Mapping[str, Any], chosen: InitFrom) -> Weights:
    """Returns what is loaded of some weights into a model of the shapes `goal`, by path.

    Raises:
        UserError: naming what is missing, or has another shape or kind of number.
    """
    asked = {path: x for path, x in goal.items() if chosen.chosen(path)}
    spare = [p for p in weights if p not in goal and chosen.chosen(p)]
    spare = [path for path in spare if not _NEVER_WANTED.fullmatch(path)]
    missing = [f'{path}: {describe(x)}' for path, x in asked.items() if path not in weights]
    unfit = [path for path in asked if path in weights and not _fits(weights[path], asked[path])]
    other = [
        f'{path}: {describe(weights[path])} there, {describe(asked[path])} in the model'
        for path in unfit
    ]
    if other or (missing and chosen.on_missing == 'error'):
        members = _members({path: weights[path] for path in unfit}, asked)
        raise UserError(_complaint(chosen, missing, other, spare, members))
    if missing:
        text = 'are not there, and keep their fresh values'
        _log.warning(
            '%s: %d arrays %s:\n%s', chosen.path, len(missing), text, indented_list(missing)
        )
    if spare:
        text = 'have no place in the model, and are left out'
        _log.warning(
            '%s: %d arrays %s:\n%s', chosen.path, len(spare), text, indented_list(_shown(spare))
        )
    found = {path: weights[path] for path in asked if path in weights}
    if not found:
        held = indented_list(_shown(weights))
        raise UserError(f'{chosen.title}nothing of {chosen.path} is loaded; it holds\n{held}')
    return found


def _complaint(
    chosen: InitFrom,
    missing: Sequence[str],
    other: Sequence[str],
    spare: Sequence[str],
    members: int | None,
) -> str:
    title = '' if chosen.path == _FRESH else chosen.title
    lines = [f'{title}{chosen.path} does not fit the model.']
    if missing:
        lines += ['It lacks', indented_list(missing)]
    if other:
        lines += ['Of another shape or kind are', indented_list(other)]
    if spare:
        lines += ['It has besides', indented_list(_shown(spare))]
    if missing and chosen.layout != 'torch' and any(path.endswith('/weight') for path in spare):
        layout_key = f"{chosen.where}layout='torch'"
        lines.append(f"These are names of PyTorch: {layout_key} turns them into Flax's.")
    if chosen.path == _FRESH:
        return '\n'.join([*lines, 'Change the operations, or the model.'])
    if members is not None:
        text = f'These may be {members} members of an ensemble: name one in {chosen.where}member.'
        return '\n'.join([*lines, text])
    if not chosen.in_config:
        return '\n'.join([*lines, f'Name the paths that differ in {chosen.where}rename.'])
    lines.append(
        f'Name the paths that differ in {chosen.where}rename, what shall keep its fresh values in '
        f'{chosen.where}exclude'
        + (f", or set {chosen.where}on_missing='init'" if missing else '')
        + ('; config.surgery changes shapes.' if other else '.')
    )
    return '\n'.join(lines)


def _shown(paths: Iterable[str]) -> list[str]:
    """Returns paths as `rename` sees them: a tensor that makes nothing has its name alone."""
    return [path.removeprefix(TENSORS) for path in paths]


def _members(unfit: Weights, asked: Mapping[str, Any]) -> int | None:
    """Returns of how many models the arrays may be that do not fit one, None if they are not."""
    sizes = {leaf.shape[:1] for leaf in unfit.values()}
    inner = all(leaf.shape[1:] == asked[path].shape for path, leaf in unfit.items())
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes and inner else None


def _fits(leaf: Any, wanted: Any) -> bool:
    kinds = [jnp.issubdtype(x.dtype, jnp.inexact) for x in (leaf, wanted)]
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # A real one would lose half of it.
        kinds[1] = jnp.issubdtype(wanted.dtype, jnp.complexfloating)
    return tuple(leaf.shape) == tuple(wanted.shape) and kinds[0] == kinds[1]


def _variables(state: TrainState) -> dict[str, jax.Array]:
    found = lib.flat(state.variables)
    # The state of a random stream is its own run's.
    return {p: x for p, x in found.items() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}


def _slots(state: TrainState) -> dict[str, jax.Array]:
    return lib.slots(lib.flat(state.opt_state, 'opt_state/'), lib.flat(state.params))


def _with_variables(state: TrainState, loaded: Mapping[str, jax.Array]) -> TrainState:
    def pick(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return loaded.get('/'.join(lib.keys_of(path)), x)

    variables = jax.tree_util.tree_map_with_path(pick, state.variables)
    params = variables.pop('params')
    return dataclasses.replace(state, params=params, collections=variables)


def _with_slots(state: TrainState, loaded: Mapping[str, jax.Array]) -> TrainState:
    leaves, structure = jax.tree.flatten(state.opt_state)
    index = {path: i for i, path in enumerate(lib.flat(state.opt_state, 'opt_state/'))}
    numbers = lib.slots(index, lib.flat(state.params))
    for path, number in numbers.items():
        leaves[number] = loaded.get(path, leaves[number])
    return dataclasses.replace(state, opt_state=jax.tree.unflatten(structure, leaves))


def _shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
