# SPDX-License-Identifier: Apache-2.0
"""Reads the arrays of a checkpoint, leaf by leaf, and changes nothing on the disk."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from trainer.modules.bound import param_path

_SHOWN = 10
_Names = tuple[str, ...]


class OtherState(Exception):
    """A checkpoint holds other leaves than the run expects; the text has a line for each.

    Attributes:
        only_slots_in_half: whether all is the same but that an optimizer's state was kept in half
            precision, as its parameters are.
    """

    only_slots_in_half = False


def read_state(directory: epath.Path, abstract: Any) -> Any:
    """Returns the state that lies in a directory.

    Leaves are found by their paths, so that containers without a leaf may differ.

    Args:
        directory: where Orbax wrote the state.
        abstract: shape, dtype and sharding of each leaf.

    Raises:
        OtherState: if a leaf is missing, is there too many, or has another shape or dtype.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = handler.metadata(directory).tree
        wanted = _by_names(abstract)
        differences = _differences(_by_names(stored), wanted)
        if differences:
            other = OtherState(_listed(differences))
            other.only_slots_in_half = len(differences) == _slots_in_half(_by_names(stored), wanted)
            raise other
        item = jax.tree_util.tree_map_with_path(lambda path, _: wanted[_names(path)], stored)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
        found = _by_names(handler.restore(directory, args=args))
    finally:
        handler.close()
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_names(path)], abstract)


def _names(path: tuple[Any, ...]) -> _Names:
    # Orbax writes tuples with field names as dicts: their paths agree by name only.
    return tuple(param_path((key,)) for key in path)


def _by_names(tree: Any) -> dict[_Names, Any]:
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _differences(stored: dict[_Names, Any], wanted: dict[_Names, Any]) -> list[str]:
    lines = []
    for names in {**wanted, **stored}:
        here, there = (_describe(tree.get(names)) for tree in (wanted, stored))
        if here != there:
            lines.append(f'  {"/".join(names)}: {there} in the checkpoint, {here} in this run')
    return lines


def _slots_in_half(stored: dict[_Names, Any], wanted: dict[_Names, Any]) -> int:
    """Returns how many leaves of the optimizer's state are there in half of the wanted float32."""
    pairs = [(stored[n], x) for n, x in wanted.items() if n[0] == 'opt_state' and n in stored]
    return sum(
        tuple(there.shape) == tuple(here.shape)
        and here.dtype == 'float32'
        and str(there.dtype) in ('float16', 'bfloat16')
        for there, here in pairs
    )


def _listed(lines: list[str]) -> str:
    more = len(lines) - _SHOWN
    return '\n'.join(lines[:_SHOWN] + ([f'  and {more} more'] if more > 0 else []))


def _describe(leaf: Any) -> str:
    if leaf is None:
        return 'absent'
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # What is stored of a typed key is its data.
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return f'{leaf.dtype}{list(leaf.shape)}'
