# SPDX-License-Identifier: Apache-2.0
"""Stages of a stream: callables from one Grain dataset to another.

Any function that takes a `grain.IterDataset` and returns one can be a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .nested import Tree, get_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Keeps only the examples for which `keep(example)` is true."""

    keep: Callable[[Tree], bool]

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of the remaining examples."""
        return dataset.filter(self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongerThan:
    """A predicate for `Filter`: a field, (n, ...), has more than `length` elements."""

    length: int
    field: str = 'tokens'

    def __call__(self, example: Tree) -> bool:
        """Returns whether the field is longer than `length`."""
        # A class and not a lambda, which a config cannot contain and worker processes cannot
        # unpickle.
        return len(get_field(example, self.field)) > self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Replaces each example by `fn(example)`, a dict, or another tree, of arrays."""

    fn: Callable[[Tree], Tree]

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of the results."""
        return dataset.map(self.fn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Splits a field into pieces of at most `length` elements, each an example of its own.

    The other fields are removed.

    Attributes:
        length: maximum number of elements per piece.
        field: the field, (n, ...); an empty one gives no example.
    """

    length: int
    field: str = 'tokens'

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f'length: {self.length}; expected a positive number')

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of the pieces."""
        import grain.python as grain

        length, field = self.length, self.field

        # Defined here, because its base class needs the import, which takes seconds.
        class Pieces(grain.experimental.FlatMapTransform):
            def flat_map(self, element: Tree) -> list[Tree]:
                whole = get_field(element, field)
                return [{field: whole[i : i + length]} for i in range(0, len(whole), length)]

        return grain.experimental.FlatMapIterDataset(dataset, Pieces())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Packs sequences of different lengths into rows of equal length (first fit).

    A sequence goes into the first open row with enough room; one longer than a row is split first.
    Besides the field, (length, ...), padded with zeros, a row has `<field>_segment_ids`, int32
    (length,), the number of the sequence from 1, or 0 for padding; and `<field>_positions`, int32
    (length,), the position within each sequence from 0.

    Attributes:
        length: elements per row.
        field: the field to pack, (n, ...); the other fields are removed.
        open_rows: number of rows that are filled at the same time. More of them waste less room,
            but a resumed run has to read the examples of all open rows again.
    """

    length: int
    field: str = 'tokens'
    open_rows: int = 16

    def __post_init__(self) -> None:
        for name in ('length', 'open_rows'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}: {getattr(self, name)}; expected a positive number')

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of the rows."""
        import grain.python as grain

        # Split first: Grain refuses a sequence that is longer than a row.
        packed = grain.experimental.FirstFitPackIterDataset(
            Split(length=self.length, field=self.field)(dataset),
            length_struct={self.field: self.length},
            num_packing_bins=self.open_rows,
            # Grain would shuffle the rows that are open together; the order is left to the source.
            shuffle_bins=False,
        )
        return packed.map(_to_plain_dict)


def _to_plain_dict(row: Any) -> Tree:
    return {name: np.asarray(x) for name, x in row.items()}
