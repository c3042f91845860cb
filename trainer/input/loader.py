# SPDX-License-Identifier: Apache-2.0
"""What a loader must offer: read this file to write one of your own.

A loader turns a source into batches, as numpy arrays on the host. `data.loader` in a config names
the class of the training loader, `evals.<name>.data.loader` that of an evaluation. There is nothing
to inherit from: whatever has the attributes and methods of `TrainLoader` (or `EvalLoader`) fits,
with any names for its other parts. They are checked once: those of a training loader when the
config is built, those of an evaluation's when the run is set up. What a loader may leave out is
listed at the end of this page.

Here is a complete training loader, of a source as in `trainer.data.sources`:

    from fractions import Fraction
    from typing import NamedTuple

    import numpy as np


    class Block(NamedTuple):
        arrays: dict[str, np.ndarray]
        ids: np.ndarray


    class InOrder:
        # The examples in the order of the source, over and over.

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

A training loader is called with the keyword arguments that `InOrder` takes: the source and the
transforms, built, and `batch_size`, `seed`, `shuffle`, `remainder` and `repeat_batch` from
`config.data`; an evaluation's loader with `source`, `transforms`, `batch_size` and `padded_to`.
Further keys of `data.loader` are further arguments.

The trainer calls `block` from one thread at a time. With several processes each of them makes the
loader, and asks for the rows that its own devices hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np

Rows = slice | np.ndarray
ALL = slice(None)


class ArraySpec(Protocol):
    """Shape and dtype of an array: a numpy array has both, and so has `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows first."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the loader has it; 64-bit values are converted when they are sent to devices."""
        ...


@runtime_checkable
class Block(Protocol):
    """The batches of consecutive steps. One call serves many steps, because calls cost time."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """Each field of the batch, (steps, rows, ...).

        `_mask`, bool (steps, rows), is false in rows of padding. An evaluation always has it; a
        training loader only if it pads. A row of padding should repeat a real one: zeros may turn
        into NaN, and 0 x NaN is not 0.
        """
        ...

    @property
    def ids(self) -> np.ndarray:
        """The number of the example in each row, int64 (steps, rows); -1 is padding.

        The trainer proves the order of the data with them (`data_digest` in `result.json`), and
        names examples in errors.
        """
        ...


@runtime_checkable
class StreamBlock(Block, Protocol):
    """The batches of consecutive steps of a stream."""

    @property
    def states(self) -> Sequence[Any] | None:
        """Where the stream stands after each step, (steps,): JSON values, saved in checkpoints.

        None if these batches do not depend on the position of the stream.
        """
        ...


@runtime_checkable
class TrainLoader(Protocol):
    """Training batches, without end. Batch s must be the same whenever it is asked for.

    That makes a resumed run exact: it starts at the step that it reached. A loader that cannot go
    back to any step is a `StreamLoader`.
    """

    @property
    def examples(self) -> int | None:
        """Number of examples of the source; None if it is not known."""
        ...

    @property
    def steps_per_epoch(self) -> Fraction | int | None:
        """Steps in which every example is used once; None if there are no epochs.

        A fraction if batches run across epoch borders. With None, the durations of the config must
        be in steps or examples.
        """
        ...

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape (`batch_size`, ...) and dtype of each field of a global batch. May read data."""
        ...

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches of the steps [start, start + count).

        Args:
            start: position of the first batch: the number of the step, from 0.
            count: number of batches, at least 1.
            rows: which rows of each global batch to return: a slice, or int64 indices, ascending.
        """
        ...


@runtime_checkable
class StreamLoader(TrainLoader, Protocol):
    """Training batches of a stream, which can only be read in order.

    `block` is asked for one step after the other, except after `restore`. Each process reads a
    stream of its own, so a run resumes exactly only with the same number of processes.
    """

    def block(self, start: int, count: int, rows: Rows = ALL) -> StreamBlock:
        """Returns the next batches; arguments as of `TrainLoader.block`."""
        ...

    def restore(self, position: int, state: Any) -> None:
        """Goes to a position that a checkpoint holds.

        Args:
            position: of the next batch that `block` will be asked for.
            state: `StreamBlock.states` of the step before it; None for the beginning of the
                stream, whatever the position.

        Raises:
            ValueError: if the state is of another stream; the message says why.
        """
        ...


@runtime_checkable
class EvalLoader(Protocol):
    """Every example of a split once, in batches of one shape; the last ones are padded."""

    @property
    def examples(self) -> int | None:
        """Number of examples of the split; None if it is not known."""
        ...

    @property
    def num_batches(self) -> int | None:
        """Number of batches; None if it is not known.

        With None `block` goes on with batches of padding after the last example, and the evaluation
        ends when no process has any example left.
        """
        ...

    @property
    def rows(self) -> int:
        """Rows of a global batch, padding included: `padded_to`, or `batch_size` if that is more.

        `padded_to` is `batch_size`, rounded up so that the rows divide over the devices.
        """
        ...

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape (`rows`, ...) and dtype of each field of a global batch, `_mask` included."""
        ...

    def block(self, start: int, count: int, rows: Rows = ALL) -> Block:
        """Returns the batches [start, start + count), `_mask` among the arrays.

        Args:
            start: number of the first batch, from 0; or, where `num_batches` is None, the next one.
            count: number of batches, at least 1.
            rows: which rows of each global batch to return: a slice, or int64 indices, ascending.
        """
        ...


# What a loader may leave out. -------------------------------------------------------------------


class TellsFirst(Protocol):
    """A loader that tells its first example, so that a resumed run notices changed data."""

    @property
    def first(self) -> Mapping[str, np.ndarray]:
        """The first example of the source as in epoch 0, each field (1, ...)."""
        ...


class Closes(Protocol):
    """A loader that has threads, processes or files to end."""

    def close(self) -> None:
        """Ends them. A later call of `block` starts them again."""
        ...


class Resizable(TrainLoader, Protocol):
    """A training loader that can resume a run with another batch size."""

    @property
    def marks(self) -> tuple[tuple[Fraction, Fraction], ...]:
        """(step, what the run had consumed by then, in batches of its current size), ascending.

        Empty for a loader that `after` has not returned.
        """
        ...

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainLoader:
        """Returns the loader of a run whose batch size has changed; positions remain steps.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, from step 0 on; the last
                one is that of this loader.

        Raises:
            ValueError: if the run cannot resume so; the message says why.
        """
        ...
