# SPDX-License-Identifier: Apache-2.0
"""Several sources as one, in the proportions that weights say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .record_errors import describe as describe_in
from .sources import Arrays, ArraySpec, Source, check_source


class Mixture:
    """A source of whose examples each other source has a fixed part.

    An epoch holds every example of every source at least once: the source that is the longest for
    its weight sets the length, and the examples of the others come again, as evenly as they can.
    What is an example here is a pure function of its index, so the order of the data, and a resume,
    are what they are for any other source; an example that comes twice is augmented in two ways.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        """Mixes sources of equal fields.

        Args:
            sources: at least one.
            weights: the part of each, in any unit; by default every example comes once.

        Raises:
            ValueError: if there is nothing to mix, a weight is not positive, or the fields differ.
        """
        for source in sources:
            check_source(source)
        lengths = np.array([len(source) for source in sources], np.int64)
        if not len(lengths) or (lengths < 1).any():
            raise ValueError(f'sources: expected some that are not empty, of lengths {lengths}')
        parts = np.asarray(lengths if weights is None else weights, np.float64)
        if parts.shape != lengths.shape or not (np.isfinite(parts) & (parts > 0)).all():
            raise ValueError(
                f'weights: {weights}; expected a positive number for each of {len(sources)} sources'
            )
        _check_fields(sources)
        self._sources = tuple(sources)
        self._lengths = lengths
        counts = np.rint(parts * (lengths / parts).max()).astype(np.int64)
        self._ends = np.cumsum(np.maximum(counts, lengths))

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return dict(self._sources[0].spec)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), each field as (n, ...)."""
        which, inner = self._place(indices)
        made: Arrays = {}
        for number in np.unique(which):
            rows = np.flatnonzero(which == number)
            for name, x in self._sources[number].gather(inner[rows]).items():
                if name not in made:
                    made[name] = np.empty((len(indices), *x.shape[1:]), x.dtype)
                made[name][rows] = x
        return made

    def describe(self, index: int) -> str:
        """Returns what messages call an example: by its own source."""
        which, inner = self._place(np.array([index]))
        return describe_in(self._sources[which[0]], int(inner[0]))

    def _place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each index, and the index in it."""
        which = np.searchsorted(self._ends, indices, side='right')
        begins = np.concatenate([[0], self._ends[:-1]])
        return which, (indices - begins[which]) % self._lengths[which]


def _check_fields(sources: Sequence[Source]) -> None:
    first = dict(sources[0].spec)
    for number, source in enumerate(sources):
        if dict(source.spec) != first:
            raise ValueError(
                f'sources: one batch needs the same fields of all. Source 0 has {_told(first)}; '
                f'source {number} has {_told(dict(source.spec))}'
            )


def _told(spec: dict[str, ArraySpec]) -> str:
    return ', '.join(f'{name}: {s.dtype}{list(s.shape)}' for name, s in spec.items())
