# SPDX-License-Identifier: Apache-2.0
"""The loader protocols: read this file to write a loader of your own.

A loader turns a source into batches, as numpy arrays on the host. `data.loader` in a config names
the class of the training loader, `evals.<name>.data.loader` that of an evaluation. There is no
base class: any class with the attributes and methods of `TrainLoader` (or `EvalLoader`) will do.
They are checked once: for a training loader when the config is built, for an evaluation when the
run is set up. Optional parts are listed at the end of this file.

A complete training loader, for a source as in `trainer.data.sources`:

    from fractions import Fraction
    from typing import NamedTuple

    import numpy as np


    class Block(NamedTuple):
        arrays: dict[str, np.ndarray]
        ids: np.ndarray


    class InOrder:
        # Reads the examples in the order of the source, over and over.

        def __init__(
            self, *, source, batch_size, transforms, seed, shuffle, remainder, repeat_batch
        ):
            if shuffle or repeat_batch or remainder != 'carry':
                raise ValueError('this loader only reads in order; set shuffle=False')
            self.examples = len(source)
            self.steps_per_epoch = Fraction(self.examples, batch_size)
            self._source = source
            self._transforms = transforms
            self._batch_size = batch_size

        @property
        def spec(self):
            return {name: x[0] for name, x in self.block(0, 1).arrays.items()}

        def block(self, start, count, rows=slice(None)):
            # Row r of step s holds example s * batch_size + r, modulo the number of examples.
            step = np.arange(start, start + count)[:, None]
            row = np.arange(self._batch_size)[None, :]
            ids = ((step * self._batch_size + row) % self.examples)[:, rows]
            arrays = self._source.gather(ids.ravel())
            for transform in self._transforms:
                arrays = transform(arrays)
            shaped = {name: x.reshape(*ids.shape, *x.shape[1:]) for name, x in arrays.items()}
            return Block(shaped, ids)

In the config:

    config.data = dict(
        loader=dict(target='mine.loader:InOrder'),
        source=dict(target='trainer.data.mnist:MNIST', split='train', limit=1000),
        transforms=(dict(target='trainer.data.transforms:ToFloat', key='image'),),
        batch_size=32,
        shuffle=False,
    )

A training loader is called with the keyword arguments of `InOrder`: the built source and
transforms, and `batch_size`, `seed`, `shuffle`, `remainder` and `repeat_batch` from `config.data`;
an evaluation loader with `source`, `transforms`, `batch_size` and `padded_to`. Other keys of
`data.loader` are passed as further arguments.

The trainer calls `block` from one thread at a time. With several processes, each creates its own
loader, and requests the rows for its own devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np

# A slice on a single process; with several, the rows of a process need not be consecutive.
Rows = slice | np.ndarray
ALL = slice(None)


class ArraySpec(Protocol):
    """Shape and dtype of an array: a numpy array has both, and so has `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, with the number of rows first."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype in the loader; 64-bit values are converted when they are sent to the devices."""
        ...


@runtime_checkable
class Block(Protocol):
    """The batches of consecutive steps: one call returns many, because each call has a cost."""

    @property
    def arrays(self) -> Any:
        """Each field of the batch, (steps, rows, ...): a dict of arrays, or another pytree of them.

        `_mask`, bool (steps, rows), is false in rows of padding. An evaluation loader always has
        it; a training loader only if it pads. A row of padding should repeat a real one: zeros may
        turn into NaN, which the mask cannot remove (0 x NaN is NaN).

        A pytree whose top is no dict, such as a tuple, has no place for `_mask`: the trainer
        computes it from `ids`.
        """
        ...

    @property
    def ids(self) -> np.ndarray:
        """The index of the example in each row, int64 (steps, rows); -1 is padding.

        The trainer computes `data_digest` in `result.json` from them, and names examples in errors.
        """
        ...


@runtime_checkable
class StreamBlock(Block, Protocol):
    """The batches of consecutive steps of a stream."""

    @property
    def states(self) -> Sequence[Any] | None:
        """State of the stream after each step, (steps,): JSON values, saved in checkpoints.

        None if these batches do not depend on the position of the stream.
        """
        ...


@runtime_checkable
class TrainLoader(Protocol):
    """An endless sequence of training batches. Batch s must be the same each time it is requested.

    This makes a resumed run exact: it continues with the batch of the step that it reached. A
    loader without random access to batches is a `StreamLoader`.
    """

    @property
    def examples(self) -> int | None:
        """Number of examples of the source; None if unknown."""
        ...

    @property
    def steps_per_epoch(self) -> Fraction | int | None:
        """Number of steps that use every example once; None if there are no epochs.

        A fraction if batches cross epoch borders. With None, the durations of the config must
        be in steps or examples.
        """
        ...

    @property
    def spec(self) -> Any:
        """Shape (`batch_size`, ...) and dtype of each field of a global batch. May read data.

        An `ArraySpec` by name, or the pytree of them that the batches are.
        """
        ...

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches of the steps [start, start + count).

        Args:
            start: step of the first batch, from 0.
            count: number of batches, at least 1.
            rows: which rows of each global batch to return: a slice, or int64 indices, ascending.
        """
        ...


@runtime_checkable
class StreamLoader(TrainLoader, Protocol):
    """Training batches of a stream, which can only be read in order.

    `block` is called for consecutive steps, except after `restore`. Each process reads its own
    stream, so a run resumes exactly only with the same number of processes.
    """

    def block(self, start: int, count: int, rows: Rows = ALL) -> StreamBlock:
        """Returns the next batches; arguments as for `TrainLoader.block`."""
        ...

    def restore(self, position: int, state: Any) -> None:
        """Moves to a position saved in a checkpoint.

        Args:
            position: step of the next batch that `block` will return.
            state: `StreamBlock.states` of the step before it; None for the beginning of the
                stream, whatever the position.

        Raises:
            ValueError: if the state belongs to another stream; the message says why.
        """
        ...


@runtime_checkable
class EvalLoader(Protocol):
    """Every example of a split once, in batches of one shape; the last ones are padded."""

    @property
    def examples(self) -> int | None:
        """Number of examples of the split; None if unknown."""
        ...

    @property
    def num_batches(self) -> int | None:
        """Number of batches; None if unknown.

        With None, `block` returns batches of padding after the last example, and the evaluation
        ends when no process has any examples left.
        """
        ...

    @property
    def rows(self) -> int:
        """Rows of a global batch, padding included: `padded_to`, or `batch_size` if that is more.

        `padded_to` is `batch_size`, rounded up so that the rows divide evenly over the devices.
        """
        ...

    @property
    def spec(self) -> Any:
        """Shape (`rows`, ...) and dtype of each field of a global batch, `_mask` included."""
        ...

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: index of the first batch, from 0; if `num_batches` is None, always the next one.
            count: number of batches, at least 1.
            rows: which rows of each global batch to return: a slice, or int64 indices, ascending.
        """
        ...


# Optional parts of a loader. -------------------------------------------------------------------


class HasFirst(Protocol):
    """A loader with its first example, so that a resumed run can detect changed data."""

    @property
    def first(self) -> Any:
        """The first example of the source, transformed as in epoch 0, each field (1, ...)."""
        ...


class HasVocabulary(Protocol):
    """A loader of tokens with their vocabulary, so that no run resumes with another one."""

    @property
    def vocabulary(self) -> str | None:
        """A checksum of the vocabulary, which differs if a token means something else.

        Those of `trainer.data` return the attribute `vocabulary` of the source, None if it has
        none.
        """
        ...


class Closable(Protocol):
    """A loader with threads, processes or files that must be closed."""

    def close(self) -> None:
        """Closes them. A later call of `block` opens them again."""
        ...


class Resizable(TrainLoader, Protocol):
    """A training loader that can resume a run with another batch size."""

    @property
    def marks(self) -> tuple[tuple[Fraction, Fraction], ...]:
        """Pairs (step, data consumed by then, in batches of the current size), ascending.

        Empty for a loader that was not returned by `after`.
        """
        ...

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainLoader:
        """Returns the loader of a run whose batch size has changed; positions remain steps.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.

        Raises:
            ValueError: if the run cannot resume this way; the message says why.
        """
        ...


class Collated(Protocol):
    """A loader of whole batches, whose arrays need not have one row for each example.

    `block` ignores its argument `rows`: it returns the global batch in every process, arrays
    (steps, ...) of any shape and all `ids`. So each process reads all examples. An array whose
    first dimension is `rows` has one entry for each example. Every batch needs `_mask`, unless it
    is no dict. If there are several shapes, `block` is called for one batch at a time.
    """

    @property
    def num_shapes(self) -> int | None:
        """How many shapes batches may have, at most; None for a loader of rows."""
        ...

    @property
    def rows(self) -> int:
        """Number of examples of a batch, padding included."""
        ...
