# SPDX-License-Identifier: Apache-2.0
"""One reader of a stream: its examples in batches, and the place where it stands."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .sources import Arrays
from .stream_pipeline import Pipeline

# Of each field, for an example's number: enough to tell examples apart, and cheap for images.
_MOST_HASHED = 4096

# Kinds of dtypes whose values have no fixed width, and their names.
_TEXT = {'U': 'text', 'S': 'bytes', 'O': 'object'}


class Reader:
    """The part of a stream that one of several readers takes.

    Attributes:
        part: (index, count): which reader of how many.
    """

    def __init__(self, pipeline: Pipeline, part: tuple[int, int] = (0, 1)):
        """Stands before the first example; nothing is read yet."""
        self.part = part
        self._pipeline = pipeline
        self._epoch = 0
        self._read_any = False
        self._ended = False
        self._examples: Any = None

    @classmethod
    def at(cls, state: Any, pipeline: Pipeline) -> Reader:
        """Returns the reader positioned at a `state`.

        Raises:
            ValueError: if it is the place of another pipeline, or none.
        """
        if not _is_state(state):
            raise ValueError(f'its place in the checkpoint is damaged: {state!r:.200}')
        reader = cls(pipeline, tuple(state['part']))
        reader.restore(state)
        return reader

    def next(self) -> Arrays | None:
        """Returns the next example of this pass, None at its end."""
        if self._ended:
            return None
        if self._examples is None:
            self._examples = iter(self._pipeline.part(*self.part, self._epoch))
        example = next(self._examples, None)
        self._ended = example is None
        return example

    def next_of_all(self) -> Arrays:
        """Returns the next example; behind the end of a pass the next one begins.

        Raises:
            ValueError: if a whole pass gives no example.
        """
        example = self.next()
        while example is None:
            if not self._read_any:
                index, count = self.part
                of_whom = f' for reader {index} of {count}' if count > 1 else ''
                raise ValueError(
                    f'the stream gave no example{of_whom} in a whole pass: its source is too '
                    'small, or its filters leave nothing'
                )
            self.close()
            self._epoch += 1
            self._read_any = False
            example = self.next()
        self._read_any = True
        return example

    def state(self) -> Any:
        """Returns the place behind the last example, as a JSON value.

        Raises:
            TypeError: if the place that the stream names is none.
        """
        place = None if self._examples is None else self._examples.get_state()
        state = {'part': list(self.part), 'epoch': self._epoch, 'any': self._read_any}
        state['workers'] = self._pipeline.workers
        # What is kept must not change as the stream goes on.
        return {**state, 'place': json.loads(json.dumps(place, default=_number))}

    def restore(self, state: Any) -> None:
        """Goes to the place of a `state`.

        Raises:
            ValueError: if it is the place of another pipeline.
        """
        if state['workers'] != self._pipeline.workers:
            raise ValueError(
                f'the place of the stream in the checkpoint is that of {state["workers"]} workers, '
                f'and here are {self._pipeline.workers}'
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
                'the place of the stream in the checkpoint is not one of this pipeline: '
                f'{type(error).__name__}: {error}'
            ) from error

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        examples, self._examples, self._ended = self._examples, None, False
        if examples is not None:
            examples.close()


def _is_state(state: Any) -> bool:
    """Whether it has the form of what `Reader.state` returns."""
    kinds = {'part': list, 'epoch': int, 'any': bool, 'workers': int, 'place': object}
    if not isinstance(state, dict) or not kinds.keys() <= state.keys():
        return False
    if not all(isinstance(state[key], kind) for key, kind in kinds.items()):
        return False
    part = state['part']
    whole = len(part) == 2 and all(type(x) is int for x in part)
    return whole and 0 <= part[0] < part[1] and state['epoch'] >= 0


def part_of(rows: np.ndarray, total: int) -> tuple[int, int]:
    """Returns which reader of how many reads these rows of each batch.

    Args:
        rows: int64, ascending.
        total: rows of a batch.

    Raises:
        ValueError: if they are no equal, consecutive part of a batch.
    """
    size = len(rows)
    if not size or total % size or rows[0] % size or (np.diff(rows) != 1).any():
        raise ValueError(
            'a stream is read in equal parts of consecutive rows, one for each process; on this '
            f'mesh a process holds rows {rows.tolist()} of {total}. Put the axes of the mesh that '
            'cut the batch first'
        )
    return int(rows[0]) // size, total // size


def stack(examples: Sequence[Arrays]) -> Arrays:
    """Returns the examples as (n, ...) arrays.

    Raises:
        ValueError: if they differ in fields or shapes.
    """
    first = examples[0]
    for example in examples:
        if _told(example) != _told(first):
            raise ValueError(
                f'a batch needs examples of one shape; the stream gave {_told(first)}, and then '
                f'{_told(example)}. Pack, pad or cut them in a stage (trainer.data.stages)'
            )
    return {name: _stacked([example[name] for example in examples]) for name in first}


def _stacked(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], np.ndarray | np.generic):
        return np.stack(values)
    objects = np.empty(len(values), object)
    for row, value in enumerate(values):  # One by one: otherwise numpy would look into lists.
        objects[row] = value
    return objects


def numbers(arrays: Arrays) -> np.ndarray:
    """Returns what stands for an example's number in a stream: a hash of each row, int64 (n,)."""
    rows = len(next(iter(arrays.values())))
    found = np.zeros(rows, np.int64)
    for row in range(rows):
        value = 0
        for name in sorted(arrays):
            value = zlib.crc32(_content(np.asarray(arrays[name][row])), value)
        found[row] = value
    return found


def _content(x: np.ndarray) -> bytes:
    """Returns a limited number of bytes of a value, the same in any batch."""
    if x.dtype.kind in _TEXT:  # Its width is that of the longest text in the batch.
        return repr(x.tolist()).encode()[:_MOST_HASHED]
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat[: -(-_MOST_HASHED // flat.itemsize)].tobytes()


def _told(example: Arrays) -> str:
    return ', '.join(f'{name}: {_kind(x)}' for name, x in sorted(example.items()))


def _kind(x: Any) -> str:
    """Returns dtype and shape; text of any length has the same dtype."""
    if not isinstance(x, np.ndarray | np.generic):
        return 'object[]'
    return f'{_TEXT.get(x.dtype.kind, x.dtype)}{list(x.shape)}'


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(
        f'the place of a stream must be a JSON value; its get_state() holds a {type(value)}'
    )
