# SPDX-License-Identifier: Apache-2.0
"""Initializes a run from other weights: `config.init_from` and `config.surgery`."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError, indented_list
from trainer.ensemble import step
from trainer.modules.model_view import path_names
from trainer.modules.shapes import describe
from trainer.step.state import TrainState
from trainer.weights import flax_layout
from trainer.weights import leaves as lib
from trainer.weights.init_from import TENSORS, InitFrom
from trainer.weights.leaves import Weights
from trainer.weights.surgery import Operation, apply_operations

_log = logging.getLogger('trainer')
# The path in messages if there is no checkpoint, only surgery on the initial weights.
_FRESH = 'the result of config.surgery'
# PyTorch's batch norm counts its batches; Flax has no such variable, so a leftover is not reported.
_IGNORED = re.compile(r'.*/num_batches_tracked')


def load_initial_weights(
    state: TrainState,
    init_from: InitFrom | None,
    surgery: Sequence[Operation],
    restart_optimizer: Callable[[TrainState], TrainState],
    *,
    members: bool = False,
) -> TrainState:
    """Returns the initial state of a run: `state` with the weights that the config asks for.

    Args:
        state: freshly initialized; its buffers are deleted.
        init_from: where to load weights from; None applies the surgery to the initial weights.
        surgery: operations on the weights, in order, before they are matched with the model.
        restart_optimizer: reinitializes optimizer state and moving average for new parameters; it
            may donate its argument.
        members: whether the state is an ensemble's. Each member gets the same loaded weights, and
            keeps its own initial values of what is not loaded.

    Raises:
        UserError: naming arrays that are missing or do not fit.
    """
    if init_from is None and not surgery:
        return state
    fresh = _variables(state)
    wanted = {path: _abstract(x) for path, x in fresh.items()}
    if init_from is not None and init_from.optimizer:
        wanted.update({path: _abstract(x) for path, x in _slots(state).items()})
    # Checkpoint and surgery are about a single model: match without the dimension of the members.
    goal = jax.tree.map(step.member_spec, wanted) if members else wanted
    if init_from is None:
        weights = lib.from_arrays(fresh)
    else:
        init_from.check_patterns(goal)  # Before reading: a typo should not cost minutes.
        weights = init_from.read({path: x.shape for path, x in goal.items()})
    weights = apply_operations(surgery, weights)
    # After the surgery: only then do the paths mean arrays of this model.
    weights = lib.align_slots(flax_layout.rename_to_model(weights, goal), goal)
    fitting = match_weights(weights, goal, init_from or InitFrom(path=_FRESH))
    for path in fitting.keys() & fresh.keys():
        # Before loading: otherwise the devices would hold the initial and the loaded weights.
        fresh[path].delete()
    loaded = lib.load(fitting, goal)
    if members:
        loaded = {path: step.repeat_for_members(x, wanted[path]) for path, x in loaded.items()}
    # The optimizer state comes from the new parameters, and loaded slots then replace parts of it.
    state = restart_optimizer(_with_variables(state, loaded))
    return _with_slots(state, loaded)


def match_weights(weights: Weights, goal: Mapping[str, Any], init_from: InitFrom) -> Weights:
    """Returns the weights to load into a model, by path.

    Args:
        weights: all that were read, under the paths of the model.
        goal: the model's shapes and dtypes, by path.
        init_from: selects the arrays to load, and says what to do about missing ones.

    Raises:
        UserError: naming arrays that are missing, or have another shape or kind of dtype.
    """
    asked = {path: x for path, x in goal.items() if init_from.selects(path)}
    spare = [p for p in weights if p not in goal and init_from.selects(p)]
    spare = [path for path in spare if not _IGNORED.fullmatch(path)]
    missing = [f'{path}: {describe(x)}' for path, x in asked.items() if path not in weights]
    unfit = [
        path for path in asked if path in weights and not _is_compatible(weights[path], asked[path])
    ]
    other = [
        f'{path}: got {describe(weights[path])}, the model has {describe(asked[path])}'
        for path in unfit
    ]
    if other or (missing and init_from.on_missing == 'error'):
        members = _count_members({path: weights[path] for path in unfit}, asked)
        raise UserError(_mismatch_message(init_from, missing, other, spare, members))
    if missing:
        text = 'missing arrays that keep their initial values'
        _log.warning('%s: %s (%d):\n%s', init_from.path, text, len(missing), indented_list(missing))
    if spare:
        text = 'ignored arrays that are not in the model'
        lines = indented_list(_display_paths(spare))
        _log.warning('%s: %s (%d):\n%s', init_from.path, text, len(spare), lines)
    selected = {path: weights[path] for path in asked if path in weights}
    if not selected:
        lines = indented_list(_display_paths(weights))
        raise UserError(
            f'{init_from.title}nothing to load from {init_from.path}, which contains\n{lines}'
        )
    return selected


def _mismatch_message(
    init_from: InitFrom,
    missing: Sequence[str],
    other: Sequence[str],
    spare: Sequence[str],
    members: int | None,
) -> str:
    title = '' if init_from.path == _FRESH else init_from.title
    lines = [f'{title}{init_from.path} does not fit the model.']
    if missing:
        lines += ['Missing:', indented_list(missing)]
    if other:
        lines += ['Different shape or kind of dtype:', indented_list(other)]
    if spare:
        lines += ['Not in the model:', indented_list(_display_paths(spare))]
    if missing and init_from.layout != 'torch' and any(path.endswith('/weight') for path in spare):
        layout_key = f"{init_from.where}layout='torch'"
        lines.append(f'These look like names of PyTorch: set {layout_key} to convert them.')
    if init_from.path == _FRESH:
        return '\n'.join([*lines, 'Change the operations or the model.'])
    if members is not None:
        text = f'These may be the {members} members of an ensemble'
        return '\n'.join([*lines, f'{text}: select one with {init_from.where}member.'])
    if not init_from.in_config:
        return '\n'.join([*lines, f'Map names that differ with {init_from.where}rename.'])
    lines.append(
        f'Map names that differ with {init_from.where}rename, list arrays that should keep their '
        f'initial values in {init_from.where}exclude'
        + (f", or set {init_from.where}on_missing='init'" if missing else '')
        + ('; config.surgery changes shapes.' if other else '.')
    )
    return '\n'.join(lines)


def _display_paths(paths: Iterable[str]) -> list[str]:
    """Returns paths as `rename` sees them: an unused PyTorch tensor without its collection."""
    return [path.removeprefix(TENSORS) for path in paths]


def _count_members(unfit: Weights, asked: Mapping[str, Any]) -> int | None:
    """Returns the number of members if the arrays look like those of an ensemble, else None."""
    sizes = {leaf.shape[:1] for leaf in unfit.values()}
    inner = all(leaf.shape[1:] == asked[path].shape for path, leaf in unfit.items())
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes and inner else None


def _is_compatible(leaf: Any, wanted: Any) -> bool:
    # Precision may differ, but integers and floats may not: a cast would lose values silently.
    kinds = [jnp.issubdtype(x.dtype, jnp.inexact) for x in (leaf, wanted)]
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # A real one would lose the imaginary part.
        kinds[1] = jnp.issubdtype(wanted.dtype, jnp.complexfloating)
    return tuple(leaf.shape) == tuple(wanted.shape) and kinds[0] == kinds[1]


def _variables(state: TrainState) -> dict[str, jax.Array]:
    leaves = lib.flatten(state.variables)
    # The state of an RNG stream belongs to its run, and is not loaded.
    return {p: x for p, x in leaves.items() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}


def _slots(state: TrainState) -> dict[str, jax.Array]:
    return lib.slots(lib.flatten(state.opt_state, 'opt_state/'), lib.flatten(state.params))


def _with_variables(state: TrainState, loaded: Mapping[str, jax.Array]) -> TrainState:
    def pick(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return loaded.get('/'.join(path_names(path)), x)

    variables = jax.tree_util.tree_map_with_path(pick, state.variables)
    params = variables.pop('params')
    return dataclasses.replace(state, params=params, collections=variables)


def _with_slots(state: TrainState, loaded: Mapping[str, jax.Array]) -> TrainState:
    leaves, structure = jax.tree.flatten(state.opt_state)
    # `slots` of the positions of the leaves: it finds the leaf at each path of a slot.
    index = {path: i for i, path in enumerate(lib.flatten(state.opt_state, 'opt_state/'))}
    positions = lib.slots(index, lib.flatten(state.params))
    for path, position in positions.items():
        leaves[position] = loaded.get(path, leaves[position])
    return dataclasses.replace(state, opt_state=jax.tree.unflatten(structure, leaves))


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
