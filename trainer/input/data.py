# SPDX-License-Identifier: Apache-2.0
"""Loaders behind one interface: checked once, with everything that a loader may leave out.

Nothing else asks what a loader can do. See `trainer.input.loader` for the contract.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from trainer.config.errors import UserError
from trainer.input.loader import (
    ALL,
    ArraySpec,
    Closes,
    EvalLoader,
    Resizable,
    Rows,
    StreamLoader,
    TellsFirst,
    TrainLoader,
)

# How each method of a loader is called: the number of arguments by position, those by name, and
# what to write in a message. The signatures are those of `trainer.input.loader`.
_CALLS: Mapping[str, tuple[int, tuple[str, ...], str]] = {
    'block': (2, ('rows',), 'block(start, count, rows=slice(None))'),
    'restore': (2, (), 'restore(position, state)'),
    'after': (1, (), 'after(batch_sizes)'),
    'close': (0, (), 'close()'),
}


@dataclasses.dataclass(frozen=True)
class LoadedBlock:
    """The batches of consecutive steps, of any loader.

    Attributes:
        arrays: each field, (steps, rows, ...).
        ids: int64 (steps, rows), the example in each row; -1 is padding.
        states: where a stream stands after each step; None for other data.
    """

    arrays: Mapping[str, np.ndarray]
    ids: np.ndarray
    states: Sequence[Any] | None = None


class Data(Protocol):
    """What training and evaluation data have in common."""

    @property
    def examples(self) -> int | None:
        """Number of examples, None if it is not known."""
        ...

    def first(self) -> Mapping[str, np.ndarray]:
        """Returns the first example, each field (1, ...)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    """What `TrainData` and `EvalData` share.

    Attributes:
        loader: as the config names it.
        with_first: the loader if it tells its first example, None otherwise.
        closing: the loader if it has something to close, None otherwise.
    """

    loader: Any
    with_first: TellsFirst | None
    closing: Closes | None

    @property
    def examples(self) -> int | None:
        """Number of examples, None if it is not known."""
        return self.loader.examples

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each field of a global batch."""
        return self.loader.spec

    def block(self, start: int, count: int, rows: Rows = ALL) -> LoadedBlock:
        """Returns the batches [start, start + count), of the given rows of each global batch."""
        block = self.loader.block(start, count, rows=rows)
        return LoadedBlock(block.arrays, block.ids)

    def first(self) -> Mapping[str, np.ndarray]:
        """Returns the first example, each field (1, ...); of the first batch, if there is no other.

        A stream may have to be restored afterwards.
        """
        if self.with_first is not None:
            return self.with_first.first
        arrays = self.block(0, 1, rows=slice(0, 1)).arrays
        return {name: x[0] for name, x in arrays.items()}

    def close(self) -> None:
        """Ends the loader's threads and processes, if it has any; `block` starts them again."""
        if self.closing is not None:
            self.closing.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainData(_Common):
    """The training loader of a run.

    Attributes:
        stream: the loader if it is a stream, None otherwise.
        resizable: the loader if it can resume with another batch size, None otherwise.
    """

    loader: TrainLoader
    stream: StreamLoader | None
    resizable: Resizable | None

    @classmethod
    def of(cls, loader: Any, path: str) -> TrainData:
        """Returns the data of a loader.

        Args:
            loader: whatever the config has made.
            path: its config path, for messages.

        Raises:
            UserError: naming what it lacks of `trainer.input.loader.TrainLoader`, or the method
                that takes other arguments.
        """
        _check(loader, path, 'TrainLoader', ('examples', 'steps_per_epoch', 'spec', 'block'))
        if _has(loader, 'after') and not _has(loader, 'marks'):
            raise UserError(
                f'{path}: {_name(loader)} has `after`, and so it must have `marks`: see '
                'trainer.input.loader.Resizable'
            )
        return cls(
            loader=loader,
            with_first=loader if _has(loader, 'first') else None,
            closing=loader if _has(loader, 'close') else None,
            stream=loader if _has(loader, 'restore') else None,
            resizable=loader if _has(loader, 'after') else None,
        )

    @property
    def steps_per_epoch(self) -> Fraction | None:
        """Steps in which every example is used once, None if there are no epochs."""
        steps = self.loader.steps_per_epoch
        return None if steps is None else Fraction(steps)

    @property
    def is_stream(self) -> bool:
        """Whether a batch depends on what was read before, and not only on its position."""
        return self.stream is not None

    @property
    def marks(self) -> tuple[tuple[Fraction, Fraction], ...]:
        """(step, consumed batches of the current size), after a change of the batch size."""
        return () if self.resizable is None else self.resizable.marks

    def block(self, start: int, count: int, rows: Rows = ALL) -> LoadedBlock:
        """Returns the batches of the steps [start, start + count)."""
        if self.stream is None:
            return super().block(start, count, rows)
        block = self.stream.block(start, count, rows=rows)
        return LoadedBlock(block.arrays, block.ids, block.states)

    def restore(self, position: int, state: Any) -> None:
        """Goes to a position; only a stream has anything to do.

        Raises:
            ValueError: if the state is of another stream.
        """
        if self.stream is not None:
            self.stream.restore(position, state)

    def after(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainData:
        """Returns the data of a run whose batch size has changed.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, this loader's last.

        Raises:
            UserError: if the loader cannot resume such a run.
        """
        before = batch_sizes[-2][1] if len(batch_sizes) > 1 else batch_sizes[-1][1]
        if self.resizable is None:
            raise UserError(
                f'config.data.batch_size: {_name(self.loader)} cannot resume a run whose '
                f'batch size was {before}: it has no method `after`, unlike '
                'data.loader:TrainLoader. Use the old batch size, or add the method'
            )
        try:
            loader = self.resizable.after(batch_sizes)
        except ValueError as error:
            raise UserError(f'config.data, after batch size {before}: {error}') from error
        return TrainData.of(loader, 'config.data.loader')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalData(_Common):
    """The loader of one evaluation."""

    loader: EvalLoader

    @classmethod
    def of(cls, loader: Any, path: str) -> EvalData:
        """Returns the data of a loader.

        Args:
            loader: whatever the config has made.
            path: its config path, for messages.

        Raises:
            UserError: naming what it lacks of `trainer.input.loader.EvalLoader`, or the method
                that takes other arguments.
        """
        _check(loader, path, 'EvalLoader', ('examples', 'num_batches', 'rows', 'spec', 'block'))
        return cls(
            loader=loader,
            with_first=loader if _has(loader, 'first') else None,
            closing=loader if _has(loader, 'close') else None,
        )

    @property
    def num_batches(self) -> int | None:
        """Number of batches, None if it is not known: then padding follows the last example."""
        return self.loader.num_batches

    @property
    def rows(self) -> int:
        """Rows of a global batch, padding included."""
        return self.loader.rows


def _check(loader: Any, path: str, contract: str, names: Sequence[str]) -> None:
    """Checks that a loader has the parts of a contract, and that its methods can be called.

    Raises:
        UserError: naming what is missing, or how a method is called.
    """
    page = f'trainer.input.loader.{contract}'
    if missing := [f'`{name}`' for name in names if not _has(loader, name)]:
        raise UserError(
            f'{path}: {_name(loader)} has no {", ".join(missing)}: a loader for this place has '
            f'{", ".join(names)}; see {page}'
        )
    for name, (placed, named, written) in _CALLS.items():
        if _has(loader, name) and not _takes(getattr(loader, name), placed, named):
            raise UserError(
                f'{path}: {_name(loader)}.{name} cannot be called as {written}, which is how the '
                'trainer calls it; see trainer.input.loader'
            )


def _has(loader: Any, name: str) -> bool:
    """Whether a loader has an attribute; a property, which may read data, is not evaluated."""
    missing = object()
    if inspect.getattr_static(loader, name, missing) is not missing:
        return True
    # One that wraps another loader may forward attributes.
    return hasattr(type(loader), '__getattr__') and hasattr(loader, name)


def _takes(method: Any, placed: int, named: Sequence[str]) -> bool:
    """Whether it is a method that can be called with these arguments."""
    if not callable(method):
        return False
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # It may be unknown for a function written in C.
        return True
    try:
        signature.bind(*range(placed), **dict.fromkeys(named))
    except TypeError:
        return False
    return True


def _name(loader: Any) -> str:
    return type(loader).__name__
