# SPDX-License-Identifier: Apache-2.0
"""Restores the arrays of a checkpoint, matched by key path; does not change files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from trainer.checkpoint import empty
from trainer.checkpoint.empty import Names
from trainer.config.errors import indented_list
from trainer.modules.model_view import path_names


class StateMismatch(Exception):
    """A checkpoint has other leaves than the run expects; the message has a line for each.

    Attributes:
        only_half_precision_slots: whether the only difference is that the optimizer state was kept
            in half precision, like its parameters.
    """

    only_half_precision_slots = False


def read_state(
    directory: epath.Path, abstract: Any, empties: Mapping[Names, Any], free: str = ''
) -> Any:
    """Returns the state stored in a directory.

    Leaves are matched by key path, so containers without leaves may differ.

    Args:
        directory: directory to which Orbax wrote the state.
        abstract: shape, dtype and sharding of each leaf.
        empties: the saved leaves without elements, which are not in the directory.
        free: a field of the state whose leaves may differ. If they do, it is returned as it was
            saved, in nested dicts.

    Raises:
        StateMismatch: if a leaf is missing or unexpected, or has another shape or dtype.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = handler.metadata(directory).tree
        wanted = _leaves_by_names(abstract)
        saved = {**_leaves_by_names(stored), **empties}
        if free and _differences(_leaves_of_field(free, saved), _leaves_of_field(free, wanted)):
            as_saved = _nest(_leaves_of_field(free, saved), abstract)
            abstract = dataclasses.replace(abstract, **{free: as_saved.get(free, {})})
            wanted = _leaves_by_names(abstract)
        # Compared first, for one message about all leaves; and Orbax casts other dtypes silently.
        differences = _differences(saved, wanted)
        if differences:
            other = StateMismatch(indented_list(differences))
            other.only_half_precision_slots = len(differences) == _count_half_precision_slots(
                saved, wanted
            )
            raise other
        # Our leaves in the stored structure: Orbax refuses an item of another structure.
        item = jax.tree_util.tree_map_with_path(lambda path, _: wanted[path_names(path)], stored)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        restored = _leaves_by_names(handler.restore(directory, args=args))
    finally:
        handler.close()
    restored.update({names: empty.make(wanted[names]) for names in empties})
    return jax.tree_util.tree_map_with_path(lambda path, _: restored[path_names(path)], abstract)


def _leaves_by_names(tree: Any) -> dict[Names, Any]:
    # Orbax stores named tuples as dicts, so only the names along the key paths agree.
    return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _leaves_of_field(field: str, leaves: dict[Names, Any]) -> dict[Names, Any]:
    return {names: leaf for names, leaf in leaves.items() if names[0] == field}


def _nest(leaves: dict[Names, Any], like: Any) -> dict[str, Any]:
    """Returns the shapes of saved leaves in nested dicts, on every device of another tree."""
    sharding = getattr(jax.tree.leaves(like)[0], 'sharding', None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    nested: dict[str, Any] = {}
    for names, leaf in leaves.items():
        inner = nested
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        dtype = jax.numpy.dtype(leaf.dtype)
        inner[names[-1]] = jax.ShapeDtypeStruct(tuple(leaf.shape), dtype, sharding=sharding)
    return nested


def _differences(stored: dict[Names, Any], wanted: dict[Names, Any]) -> list[str]:
    lines = []
    for names in {**wanted, **stored}:
        here, there = (_describe(tree.get(names)) for tree in (wanted, stored))
        if here != there:
            lines.append(f'{"/".join(names)}: {there} in the checkpoint, {here} in this run')
    return lines


def _count_half_precision_slots(stored: dict[Names, Any], wanted: dict[Names, Any]) -> int:
    """Counts the optimizer leaves that are stored in half precision but expected in float32."""
    pairs = [(stored[n], x) for n, x in wanted.items() if n[0] == 'opt_state' and n in stored]
    return sum(
        tuple(there.shape) == tuple(here.shape)
        and here.dtype == 'float32'
        and str(there.dtype) in ('float16', 'bfloat16')
        for there, here in pairs
    )


def _describe(leaf: Any) -> str:
    if leaf is None:
        return 'absent'
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # A typed key is stored as its data.
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f'{leaf.dtype}{list(leaf.shape)}'
