# SPDX-License-Identifier: Apache-2.0
"""The rows of an evaluation on the host of the main process: all examples, in the split's order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.batch import LoadedBatch
from trainer.parallel.host import fetch
from trainer.parallel.mesh import LocalExamples
from trainer.parallel.messages import Messages

Arrays = dict[str, np.ndarray]
# Begins the names of arrays that metrics collect.
COLLECTED = 'collected/'
# The name of the ids among the arrays of a part.
_IDS = '_ids'
# Arrays that say what is padding in a batch of sequences (`trainer.data.sequences`).
_LENGTHS = ('length', 'is_real')


def gather_rows(
    messages: Messages,
    outputs: Mapping[str, jax.Array],
    host: Mapping[str, np.ndarray],
    batch: LoadedBatch,
) -> tuple[np.ndarray, Arrays] | None:
    """Brings the rows of a batch to the main process, without padding.

    Every process sends the rows that it owns, read from its own devices: neither the devices nor
    the other processes ever hold the whole. All processes must call it.

    Args:
        messages: those of the evaluation.
        outputs: computed arrays, (rows, ...), sharded like the batch.
        host: arrays of the rows that this process has read, (rows of the process, ...).
        batch: the batch that they were computed from.

    Returns:
        In the main process the ids of the examples, int64 (n,), and their arrays by name, in the
        order of the rows of the global batch; None in the other processes.
    """
    ids = batch.ids[0]
    arrays = {**_local_rows(outputs, batch.rows), **host}
    order, owned = np.arange(len(ids)), np.ones(len(ids), bool)
    if batch.rows is not None:
        order, owned = batch.rows.indices, batch.rows.is_owned
    # Padding is left out before anything is sent.
    selected = owned & (ids >= 0)
    parts = messages.gather(
        (order[selected], ids[selected], {name: x[selected] for name, x in arrays.items()})
    )
    if parts is None:
        return None
    if len(parts) == 1:
        return parts[0][1], parts[0][2]
    joined = join_parts([(rows, {_IDS: some, **part}) for rows, some, part in parts])
    return joined.pop(_IDS), joined


def join_parts(parts: Sequence[tuple[np.ndarray, Arrays]]) -> Arrays:
    """Returns arrays of several processes in the order of the rows of the global batch.

    Args:
        parts: of each process, the indices of its rows and their arrays by name.
    """
    # The parts arrive in the order of the processes, which need not be that of the batch.
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    names = parts[0][1]
    return {name: np.concatenate([x[name] for _, x in parts])[order] for name in names}


def _local_rows(outputs: Mapping[str, jax.Array], rows: LocalExamples | None) -> Arrays:
    """Returns the rows of this process: all of them if it is the only one."""
    if rows is None:
        arrays = fetch(dict(outputs))
    else:
        # All outputs at once, before the shards are copied one by one.
        jax.block_until_ready(dict(outputs))
        arrays = {name: _addressable_rows(x) for name, x in outputs.items()}
    # Functions of numpy and of other libraries do not know bfloat16.
    return {name: x.astype(np.float32) if x.dtype.kind == 'V' else x for name, x in arrays.items()}


def _addressable_rows(x: jax.Array) -> np.ndarray:
    # Shards along other axes of the mesh are copies of the same rows.
    parts: dict[int, Any] = {
        shard.index[0].start or 0: shard.data for shard in x.addressable_shards
    }
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def join_batches(batches: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """Returns the predictions for several batches as one array each, (examples, ...).

    Args:
        batches: the predictions for each batch by name, (examples of the batch, ...).

    Raises:
        UserError: if an array has to be padded, and no other one says what is padding.
    """
    parts = {name: [batch[name] for batch in batches] for name in batches[0]}
    check_padding(parts, "return 'length' from predict, too")
    return {name: join_arrays(parts[name]) for name in parts}


def join_arrays(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the arrays of several batches as one, (examples, ...).

    Batches of sequences differ in length, so that their predictions may: the shorter ones are
    padded at the end with 0, or with '' in text, to the size of the largest.

    Args:
        parts: of each batch, (examples of the batch, ...).
    """
    shapes = {x.shape[1:] for x in parts}
    # Arrays that differ in the number of dimensions do not belong together, which numpy reports.
    if len(shapes) == 1 or len({len(shape) for shape in shapes}) > 1:
        return np.concatenate(parts)
    largest = tuple(map(max, *shapes))
    joined = np.zeros((sum(map(len, parts)), *largest), np.result_type(*parts))
    start = 0
    for x in parts:
        end = start + len(x)
        joined[(slice(start, end), *map(slice, x.shape[1:]))] = x
        start = end
    return joined


def check_padding(
    parts: Mapping[str, Sequence[np.ndarray]], fix: str, *, weights: Sequence[str] = ()
) -> None:
    """Checks that, if arrays have to be padded, one of them says what is padding.

    Args:
        parts: arrays of each batch by name, (examples of the batch, ...).
        fix: how to get such an array, for the message.
        weights: names of weights. They say it if they are padded themselves, with weight 0.

    Raises:
        UserError: if none does: `length`, `is_real` or weights.
    """
    shapes = {name: {x.shape[1:] for x in each} for name, each in parts.items()}
    padded = [name for name, each in shapes.items() if len(each) > 1]
    known = [name for name in parts if name.rpartition('/')[2] in _LENGTHS]
    known += [name for name in padded if name in weights]
    if padded and not known:
        raise UserError(
            f'batches differ in length: {padded[0]!r} is {describe_shapes(shapes[padded[0]])}, and '
            f'no array says what is padding; {fix}'
        )


def describe_shapes(shapes: Iterable[tuple[int, ...]]) -> str:
    """Returns the shapes of batches without their size: '(examples, 16) and (examples, 32)'."""
    texts = [', '.join(['examples', *map(str, shape)]) for shape in sorted(shapes)]
    return ' and '.join(f'({text})' for text in texts)


class AllRows:
    """Collects the rows of batches until the end of a split.

    Examples are sorted by their ids at the end, unless the split is a stream: its ids are hashes,
    and its order is that of the batches.
    """

    def __init__(self, *, by_id: bool):
        """Has no rows yet.

        Args:
            by_id: whether ids are positions in the split.
        """
        self._by_id = by_id
        self._ids: list[np.ndarray] = []
        self._arrays: dict[str, list[np.ndarray]] = {}

    def add(self, ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds the rows of a batch."""
        self._ids.append(ids)
        for name, x in arrays.items():
            self._arrays.setdefault(name, []).append(x)

    def join(self) -> Arrays:
        """Returns all rows by name, (examples, ...), and forgets them.

        Raises:
            UserError: if an array has to be padded, and no other one says what is padding.
        """
        self._check_padding()
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, np.int64)
        is_sorted = not self._by_id or bool((ids[1:] >= ids[:-1]).all())
        order = None if is_sorted else np.argsort(ids, kind='stable')
        joined = {}
        # One field after the other, so that only one is in memory twice.
        for name in list(self._arrays):
            x = join_arrays(self._arrays.pop(name))
            joined[name] = x if order is None else x[order]
        self._ids = []
        return joined

    def _check_padding(self) -> None:
        # A metric reads no other arrays than its own.
        groups: dict[str, dict[str, list[np.ndarray]]] = {}
        for name, parts in self._arrays.items():
            group = name.rpartition('/')[0] if name.startswith(COLLECTED) else ''
            groups.setdefault(group, {})[name] = parts
        for group, arrays in groups.items():
            fix = "return 'length' from predict, or name it in score.fields"
            if group:
                fix = "let the metric collect 'length' or weights of each element, too"
            check_padding(arrays, fix, weights=(f'{group}/weights',) if group else ())
