# SPDX-License-Identifier: Apache-2.0
"""One reader of a stream: its examples, and its position for checkpoints."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import nested
from .nested import Tree
from .stream_pipeline import Pipeline

# Bytes of each field that are hashed for an example's id: enough to distinguish examples, and
# cheap for images.
_MAX_HASHED_BYTES = 4096

# Names of the dtype kinds whose values have no fixed width.
_TEXT = {'U': 'text', 'S': 'bytes', 'O': 'object'}


class Reader:
    """Reads the part of a stream that belongs to one of several readers.

    Attributes:
        part: (index, count): the index of the reader, and the number of readers.
    """

    def __init__(self, pipeline: Pipeline, part: tuple[int, int] = (0, 1)):
        """Positions the reader before the first example, without reading it."""
        self.part = part
        self._pipeline = pipeline
        self._epoch = 0
        self._read_any = False
        self._ended = False
        self._examples: Any = None

    @classmethod
    def from_state(cls, state: Any, pipeline: Pipeline) -> Reader:
        """Returns the reader positioned at a `state`.

        Raises:
            ValueError: if the state is damaged, or belongs to another pipeline.
        """
        if not _is_state(state):
            raise ValueError(f'the stream position in the checkpoint is damaged: {state!r:.200}')
        reader = cls(pipeline, tuple(state['part']))
        reader.restore(state)
        return reader

    def next(self) -> Tree | None:
        """Returns the next example of this pass, or None at its end."""
        if self._ended:
            return None
        if self._examples is None:
            # Opened at the first read: a reader that is restored right away would start its threads
            # twice.
            self._examples = iter(self._pipeline.part(*self.part, self._epoch))
        example = next(self._examples, None)
        self._ended = example is None
        return example

    def next_repeating(self) -> Tree:
        """Returns the next example, of the next pass after the end of one.

        Raises:
            ValueError: if a whole pass has no example.
        """
        example = self.next()
        while example is None:
            # A pass without any example would be repeated forever.
            if not self._read_any:
                index, count = self.part
                reader = f' for reader {index} of {count}' if count > 1 else ''
                raise ValueError(
                    f'a whole pass over the stream has no example{reader}: the source is too '
                    'small, or its filters remove everything'
                )
            self.close()
            self._epoch += 1
            self._read_any = False
            example = self.next()
        self._read_any = True
        return example

    def state(self) -> Any:
        """Returns the position after the last example, as a JSON value.

        Raises:
            TypeError: if `get_state` of the stream does not return a JSON value.
        """
        position = None if self._examples is None else self._examples.get_state()
        state = {'part': list(self.part), 'epoch': self._epoch, 'any': self._read_any}
        state['workers'] = self._pipeline.workers
        # A deep copy, because the stream may change its state in place as it continues.
        return {**state, 'place': json.loads(json.dumps(position, default=_to_json))}

    def restore(self, state: Any) -> None:
        """Moves to the position in a `state`.

        Raises:
            ValueError: if the state belongs to another pipeline.
        """
        # With workers, the position is one per worker, each in its own part.
        if state['workers'] != self._pipeline.workers:
            raise ValueError(
                'the stream position in the checkpoint is for '
                f'{state["workers"]} workers, and this run has {self._pipeline.workers}; set '
                f'workers={state["workers"]}'
            )
        self.close()
        self._epoch, self._read_any = state['epoch'], state['any']
        if state['place'] is None:
            return
        self._examples = iter(self._pipeline.part(*self.part, self._epoch))
        try:
            self._examples.set_state(state['place'])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                'the stream position in the checkpoint does not fit this pipeline: '
                f'{type(error).__name__}: {error}'
            ) from error

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        examples, self._examples, self._ended = self._examples, None, False
        if examples is not None:
            examples.close()


def _is_state(state: Any) -> bool:
    """Whether a value has the form of `Reader.state()`."""
    kinds = {'part': list, 'epoch': int, 'any': bool, 'workers': int, 'place': object}
    if not isinstance(state, dict) or not kinds.keys() <= state.keys():
        return False
    if not all(isinstance(state[key], kind) for key, kind in kinds.items()):
        return False
    part = state['part']
    is_pair = len(part) == 2 and all(type(x) is int for x in part)
    return is_pair and 0 <= part[0] < part[1] and state['epoch'] >= 0


def reader_part(rows: np.ndarray, total: int) -> tuple[int, int]:
    """Returns (index, count): which of how many readers reads these rows of each batch.

    Args:
        rows: int64, ascending.
        total: rows of a batch.

    Raises:
        ValueError: if the rows are not one of several equal, consecutive parts of a batch.
    """
    size = len(rows)
    if not size or total % size or rows[0] % size or (np.diff(rows) != 1).any():
        raise ValueError(
            'a stream is read in equal parts of consecutive rows, one for each process; on this '
            f'mesh a process needs rows {rows.tolist()} of {total}. Put the mesh axes that '
            'shard the batch first'
        )
    return int(rows[0]) // size, total // size


def stack(examples: Sequence[Tree]) -> Tree:
    """Returns the examples as (n, ...) arrays.

    Raises:
        ValueError: if they differ in structure or shapes.
    """
    first = _describe(examples[0])
    for example in examples:
        if (found := _describe(example)) != first:
            raise ValueError(
                f'all examples of a batch need the same shapes; the stream has {first}, then '
                f'{found}. Pack, pad or split them in a stage (trainer.data.stages)'
            )
    try:
        return nested.map_arrays(lambda *values: _stack_values(values), *examples)
    except nested.StructureError as error:
        raise ValueError(
            'all examples of a batch need the same structure; the stream has an example that '
            f'differs from the one before: {error.difference}'
        ) from None


def _stack_values(values: Sequence[Any]) -> np.ndarray:
    if isinstance(values[0], np.ndarray | np.generic):
        return np.stack(values)
    objects = np.empty(len(values), object)
    for row, value in enumerate(values):  # One by one: numpy would turn lists into dimensions.
        objects[row] = value
    return objects


def hash_rows(arrays: Tree) -> np.ndarray:
    """Returns a hash of each row, int64 (n,): the example ids of a stream, which has no indices."""
    leaves = nested.leaves_with_names(arrays)
    # Sorted, so that the hash does not depend on the order in which a stage adds fields.
    columns = [leaves[name] for name in sorted(leaves)]
    hashes = np.zeros(len(columns[0]), np.int64)
    for row in range(len(hashes)):
        value = 0
        for column in columns:
            value = zlib.crc32(_content(np.asarray(column[row])), value)
        hashes[row] = value
    return hashes


def _content(x: np.ndarray) -> bytes:
    """Returns the first bytes of a value, which do not depend on the rest of the batch."""
    if x.dtype.kind in _TEXT:  # Its raw bytes depend on the longest text in the batch.
        return repr(x.tolist()).encode()[:_MAX_HASHED_BYTES]
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat[: -(-_MAX_HASHED_BYTES // flat.itemsize)].tobytes()


def _describe(example: Tree) -> str:
    leaves = nested.leaves_with_names(example)
    return ', '.join(f'{name}: {_kind(x)}' for name, x in sorted(leaves.items()))


def _kind(x: Any) -> str:
    """Returns dtype and shape, with one dtype name for text of any length."""
    if not isinstance(x, np.ndarray | np.generic):
        return 'object[]'
    return f'{_TEXT.get(x.dtype.kind, x.dtype)}{list(x.shape)}'


def _to_json(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(
        f'get_state() of a stream must return a JSON value; it contains a {type(value)}'
    )
