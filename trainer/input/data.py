# SPDX-License-Identifier: Apache-2.0
"""Wrappers that check a loader once, and give all loaders the same interface.

No other code asks which optional methods a loader has. See `trainer.input.loader`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.collected import Collector
from trainer.input.digest import PADDING
from trainer.input.fields import MASK
from trainer.input.loader import (
    ALL,
    ArraySpec,
    Block,
    Closable,
    EvalLoader,
    HasFirst,
    Resizable,
    Rows,
    StreamLoader,
    TrainLoader,
)
from trainer.input.structure import Structure, check_arrays, is_flat
from trainer.modules.seen import describe

# How the trainer calls each method: number of positional arguments, names of keyword arguments,
# and the signature for messages. See `trainer.input.loader`.
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
        arrays: each field, (steps, rows, ...); nested ones by path (`trainer.input.structure`).
            Whole batches are (steps, ...).
        ids: int64 (steps, rows), the example in each row; -1 is padding.
        states: state of a stream after each step; None for other data.
    """

    arrays: Mapping[str, np.ndarray]
    ids: np.ndarray
    states: Sequence[Any] | None = None


class Data(Protocol):
    """The interface that training and evaluation data share."""

    @property
    def examples(self) -> int | None:
        """Number of examples; None if unknown."""
        ...

    @property
    def vocabulary(self) -> str | None:
        """A checksum of the vocabulary of its tokens; None without one."""
        ...

    def first_example(self) -> Mapping[str, np.ndarray]:
        """Returns the first example, each field (1, ...)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    """Base class of `TrainData` and `EvalData`.

    Attributes:
        loader: the loader that the config defines.
        path: its config path, for messages.
        with_first: the loader if it has `first`, None otherwise.
        closing: the loader if it has `close`, None otherwise.
    """

    loader: Any
    path: str
    with_first: HasFirst | None
    closing: Closable | None

    @property
    def examples(self) -> int | None:
        """Number of examples; None if unknown."""
        return self.loader.examples

    @property
    def vocabulary(self) -> str | None:
        """See `trainer.input.loader.HasVocabulary`; None if the loader has none."""
        checksum = getattr(self.loader, 'vocabulary', None)
        # A source of the user may have an attribute of this name that is something else.
        return checksum if isinstance(checksum, str) else None

    @property
    def spec(self) -> Mapping[str, ArraySpec]:
        """Shape (batch dimension first) and dtype of each field of a global batch."""
        return self._spec_and_structure[0]

    @property
    def structure(self) -> Structure | None:
        """The structure of a nested batch; None for a dict of arrays."""
        return self._spec_and_structure[1]

    @functools.cached_property
    def _spec_and_structure(self) -> tuple[Mapping[str, ArraySpec], Structure | None]:
        tree: Any = self.loader.spec
        structure = Structure.from_tree(tree, self.path)
        if structure is None:
            return tree, None
        spec = structure.flatten(tree, self.path)
        check_arrays(spec, f'{self.path}.spec')
        if not structure.has_place_for_mask:
            rows = getattr(self.loader, 'rows', next(iter(spec.values())).shape[0])
            spec[MASK] = jax.ShapeDtypeStruct((rows,), np.dtype(bool))
        return spec, structure

    @property
    def num_shapes(self) -> int | None:
        """How many shapes batches may have, if the loader returns whole ones; None for rows.

        See `trainer.input.loader.Collated`.
        """
        return getattr(self.loader, 'num_shapes', None)

    def block(self, start: int, count: int, rows: Rows = ALL) -> LoadedBlock:
        """Returns the batches [start, start + count), of the given rows of each global batch."""
        block = self.loader.block(start, count, rows=rows)
        return LoadedBlock(self._flatten(block), block.ids)

    def _flatten(self, block: Block) -> Mapping[str, np.ndarray]:
        """Returns the arrays of a block by name.

        Raises:
            UserError: if they have another structure than `spec`.
        """
        arrays, structure = block.arrays, self.structure
        if structure is None:
            if not is_flat(arrays):
                raise UserError(
                    f'{self.path}: a batch is {describe(arrays)}, but the `spec` of the loader is '
                    'a dict of arrays; both need one structure'
                )
            return arrays
        fields = structure.flatten(arrays, self.path)
        if not structure.has_place_for_mask:
            fields[MASK] = block.ids != PADDING
        return fields

    def first_example(self) -> Mapping[str, np.ndarray]:
        """Returns the first example, each field (1, ...); by default the first row of batch 0.

        Reading batch 0 moves a stream, so the caller may have to restore its position.
        """
        if self.with_first is not None:
            first = self.with_first.first
            structure = Structure.from_tree(first, self.path)
            return first if structure is None else structure.flatten(first, self.path)
        # One row alone, so that a source of images decodes only one.
        arrays = self.block(0, 1, rows=slice(0, 1)).arrays
        return {name: x[0] for name, x in arrays.items()}

    def close(self) -> None:
        """Ends the threads and processes of the loader, if any; `block` starts them again."""
        if self.closing is not None:
            self.closing.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainData(_Common):
    """The training loader of a run.

    Attributes:
        loader: the loader that the config defines.
        stream: the loader if it is a stream, None otherwise.
        resizable: the loader if it can resume with another batch size, None otherwise.
    """

    loader: TrainLoader
    stream: StreamLoader | None
    resizable: Resizable | None

    @classmethod
    def from_loader(cls, loader: Any, path: str) -> TrainData:
        """Checks a loader and wraps it.

        Args:
            loader: any object built from the config.
            path: config path of the loader, for messages.

        Raises:
            UserError: if it lacks a part of `trainer.input.loader.TrainLoader`, or a method has
                other arguments.
        """
        names = ['examples', 'steps_per_epoch', 'spec', 'block']
        # Of whole batches it alone knows how many examples they have.
        names += [] if getattr(loader, 'num_shapes', None) is None else ['rows']
        _check(loader, path, 'TrainLoader', names)
        if _has(loader, 'after') and not _has(loader, 'marks'):
            raise UserError(
                f'{path}: {_name(loader)} has `after` but no `marks`; see '
                'trainer.input.loader.Resizable'
            )
        return cls(
            loader=loader,
            path=path,
            with_first=loader if _has(loader, 'first') else None,
            closing=loader if _has(loader, 'close') else None,
            stream=loader if _has(loader, 'restore') else None,
            resizable=loader if _has(loader, 'after') else None,
        )

    @property
    def steps_per_epoch(self) -> Fraction | None:
        """Number of steps that use every example once; None if there are no epochs."""
        # A loader may return an int; exact fractions keep the borders of epochs from drifting.
        steps = self.loader.steps_per_epoch
        return None if steps is None else Fraction(steps)

    @property
    def collector(self) -> Collector | None:
        """The source, if it makes its batches with the model; None for any other."""
        return getattr(self.loader, 'collector', None)

    @property
    def is_stream(self) -> bool:
        """Whether a batch depends on what was read before, not only on its position."""
        return self.stream is not None

    @property
    def marks(self) -> tuple[tuple[Fraction, Fraction], ...]:
        """See `trainer.input.loader.Resizable.marks`; empty if the batch size has not changed."""
        return () if self.resizable is None else self.resizable.marks

    def block(self, start: int, count: int, rows: Rows = ALL) -> LoadedBlock:
        """Returns the batches of the steps [start, start + count)."""
        if self.stream is None:
            return super().block(start, count, rows)
        block = self.stream.block(start, count, rows=rows)
        return LoadedBlock(self._flatten(block), block.ids, block.states)

    def rows(self, batch_size: int) -> int:
        """Returns the number of examples of a global batch, padding included."""
        loader: Any = self.loader
        return batch_size if self.num_shapes is None else loader.rows

    def restore(self, position: int, state: Any) -> None:
        """Moves a stream to a position; does nothing for other data.

        Raises:
            ValueError: if the state belongs to another stream.
        """
        if self.stream is not None:
            self.stream.restore(position, state)

    def with_batch_sizes(self, batch_sizes: Sequence[tuple[int, int]]) -> TrainData:
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
                'trainer.data.loader:TrainLoader. Use the old batch size, or add `after`'
            )
        try:
            loader = self.resizable.after(batch_sizes)
        except ValueError as error:
            raise UserError(f'config.data, after batch size {before}: {error}') from error
        # Checked again: `after` may return an object of any class.
        return TrainData.from_loader(loader, 'config.data.loader')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalData(_Common):
    """The loader of one evaluation.

    Attributes:
        loader: the loader that the config defines.
    """

    loader: EvalLoader

    @classmethod
    def from_loader(cls, loader: Any, path: str) -> EvalData:
        """Checks a loader and wraps it.

        Args:
            loader: any object built from the config.
            path: config path of the loader, for messages.

        Raises:
            UserError: if it lacks a part of `trainer.input.loader.EvalLoader`, or a method has
                other arguments.
        """
        _check(loader, path, 'EvalLoader', ('examples', 'num_batches', 'rows', 'spec', 'block'))
        return cls(
            loader=loader,
            path=path,
            with_first=loader if _has(loader, 'first') else None,
            closing=loader if _has(loader, 'close') else None,
        )

    @property
    def num_batches(self) -> int | None:
        """Number of batches; None if unknown: then padding follows the last example."""
        return self.loader.num_batches

    @property
    def rows(self) -> int:
        """Rows of a global batch, padding included."""
        return self.loader.rows


def _check(loader: Any, path: str, protocol: str, names: Sequence[str]) -> None:
    """Checks that a loader has the attributes of a protocol, and the signatures of its methods.

    Raises:
        UserError: naming the missing attribute, or the signature that a method needs.
    """
    page = f'trainer.input.loader.{protocol}'
    if missing := [f'`{name}`' for name in names if not _has(loader, name)]:
        raise UserError(
            f'{path}: {_name(loader)} has no {", ".join(missing)}; this loader needs '
            f'{", ".join(names)}: see {page}'
        )
    for name, (num_positional, keywords, signature) in _CALLS.items():
        # Optional methods are checked only if they exist.
        if _has(loader, name) and not _accepts(getattr(loader, name), num_positional, keywords):
            raise UserError(
                f'{path}: {_name(loader)}.{name} cannot be called as {signature}; see '
                'trainer.input.loader'
            )


def _has(loader: Any, name: str) -> bool:
    """Whether a loader has an attribute, without evaluating properties, which may read data."""
    missing = object()
    if inspect.getattr_static(loader, name, missing) is not missing:
        return True
    # A wrapper may forward attributes to another loader.
    return hasattr(type(loader), '__getattr__') and hasattr(loader, name)


def _accepts(method: Any, num_positional: int, keywords: Sequence[str]) -> bool:
    """Whether a value can be called with these arguments."""
    # A loader may have an attribute of this name for something else.
    if not callable(method):
        return False
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # Functions written in C may have no signature.
        return True
    try:
        # `bind` accepts exactly the calls that Python would accept, with defaults and *args; the
        # values do not matter.
        signature.bind(*range(num_positional), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _name(loader: Any) -> str:
    return type(loader).__name__
