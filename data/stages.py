# SPDX-License-Identifier: Apache-2.0
"""Stages of a stream: callables from one Grain dataset to another.

Any function of the user that takes a `grain.IterDataset` and returns one is a stage too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .sources import Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Leaves out the examples for which `keep(example)` is false."""

    keep: Callable[[Arrays], bool]

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of what is left."""
        return dataset.filter(self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongerThan:
    """Whether a field of an example, (n, ...), has more than `length` elements: for `Filter`."""

    length: int
    field: str = 'tokens'

    def __call__(self, example: Arrays) -> bool:
        """Returns whether it does."""
        return len(example[self.field]) > self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Changes each example into `fn(example)`, a dict of arrays."""

    fn: Callable[[Arrays], Arrays]

    def __call__(self, dataset: Any) -> Any:
        """Returns the `grain.IterDataset` of the results."""
        return dataset.map(self.fn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Cuts a field that is longer than `length` into several examples; the other fields go.

    Attributes:
        length: the most elements of a piece.
        field: the field, (n, ...); one of no element gives no example.
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

        class Pieces(grain.experimental.FlatMapTransform):
            def flat_map(self, element: Arrays) -> list[Arrays]:
                whole = element[field]
                return [{field: whole[i : i + length]} for i in range(0, len(whole), length)]

        return grain.experimental.FlatMapIterDataset(dataset, Pieces())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Puts sequences of different lengths beside each other into rows of one length.

    A sequence goes into the first of some open rows that has room for it; one that is longer than a
    row is cut first. Beside the field, (length, ...) and zeros behind the last sequence, a row has
    `<field>_segment_ids`, int32 (length,), which counts the sequences from 1 and is 0 where there
    is none, and `<field>_positions`, int32 (length,), which counts in each from 0.

    Attributes:
        length: elements of a row.
        field: the field that is packed, (n, ...); the other fields go.
        open_rows: rows that are filled at the same time: more of them leave less room unused, and a
            restored run reads again what was open.
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

        packed = grain.experimental.FirstFitPackIterDataset(
            Split(length=self.length, field=self.field)(dataset),
            length_struct={self.field: self.length},
            num_packing_bins=self.open_rows,
            shuffle_bins=False,
        )
        return packed.map(_plain)


def _plain(row: Any) -> Arrays:
    return {name: np.asarray(x) for name, x in row.items()}
