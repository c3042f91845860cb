# SPDX-License-Identifier: Apache-2.0
"""Several sources combined into one, in proportion to their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import nested
from .nested import Tree
from .record_errors import describe as describe_example
from .sources import Source, check_source, join_vocabularies


class Mixture:
    """A source that mixes other sources in fixed proportions.

    An epoch has every example of every source at least once: the source with the largest ratio of
    length to weight sets the length of the epoch, and the examples of the others repeat, as evenly
    as possible. An example is a pure function of its index, so shuffling and resuming work as for
    any other source. A repeated example gets different random augmentations each time.

    Attributes:
        vocabulary: a checksum of the vocabulary of the sources; None if they have none.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        """Mixes sources of equal fields.

        Args:
            sources: at least one source.
            weights: relative weight of each source; by default its length, so that every example
                occurs once per epoch.

        Raises:
            ValueError: if there are no sources, a source is empty, a weight is not positive, or the
                fields or vocabularies differ.
        """
        for source in sources:
            check_source(source)
        lengths = np.array([len(source) for source in sources], np.int64)
        if not len(lengths) or (lengths < 1).any():
            raise ValueError(f'sources: expected non-empty sources, got lengths {lengths}')
        ratios = np.asarray(lengths if weights is None else weights, np.float64)
        if ratios.shape != lengths.shape or not (np.isfinite(ratios) & (ratios > 0)).all():
            raise ValueError(
                f'weights: expected a positive number for each of {len(sources)} sources, got '
                f'{weights}'
            )
        _check_fields(sources)
        self.vocabulary = join_vocabularies(sources)
        self._sources = tuple(sources)
        self._lengths = lengths
        # Scaled so that the source with the largest ratio of length to weight occurs exactly once.
        counts = np.rint(ratios * (lengths / ratios).max()).astype(np.int64)
        # At least the length: rounding could lose an example.
        self._ends = np.cumsum(np.maximum(counts, lengths))

    @property
    def spec(self) -> Tree:
        """Shape and dtype of each field of one example."""
        return _spec(self._sources[0])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, indices: np.ndarray) -> Tree:
        """Returns the examples at `indices` (n,), each field as (n, ...)."""
        which, inner = self._locate(indices)
        whole: Tree = None
        # One source at least, also for no indices: its arrays have the dtypes.
        for number in np.unique(which) if len(which) else [0]:
            # One gather per source, and not one per example.
            rows = np.flatnonzero(which == number)
            part = self._sources[number].gather(inner[rows])
            if whole is None:
                # The sources have equal fields, so the first one determines shapes and dtypes.
                whole = nested.map_arrays(
                    lambda x: np.empty((len(indices), *x.shape[1:]), x.dtype), part
                )

            def fill(to: np.ndarray, x: np.ndarray, rows: np.ndarray = rows) -> None:
                to[rows] = x

            nested.map_arrays(fill, whole, part)
        return whole

    def describe(self, index: int) -> str:
        """Returns the name of an example for messages, as its own source describes it."""
        which, inner = self._locate(np.array([index]))
        return describe_example(self._sources[which[0]], int(inner[0]))

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each index, and the index in it."""
        which = np.searchsorted(self._ends, indices, side='right')
        begins = np.concatenate([[0], self._ends[:-1]])
        # The modulo repeats a source that is shorter than its share.
        return which, (indices - begins[which]) % self._lengths[which]


def _check_fields(sources: Sequence[Source]) -> None:
    first = _spec(sources[0])
    for number, source in enumerate(sources):
        if _spec(source) != first:
            raise ValueError(
                f'sources: all need the same fields. Source 0 has {_describe_spec(first)}; '
                f'source {number} has {_describe_spec(_spec(source))}'
            )


def _spec(source: Source) -> Tree:
    # In dicts of the type `dict`, so that specs can be compared.
    return nested.map_arrays(lambda spec: spec, source.spec)


def _describe_spec(spec: Tree) -> str:
    leaves = nested.leaves_with_names(spec)
    return ', '.join(f'{name}: {s.dtype}{list(s.shape)}' for name, s in leaves.items())
