# SPDX-License-Identifier: Apache-2.0
"""Sequences of different lengths: a source that pads each batch to one of a few lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .nested import get_field, has_field, map_named
from .order import combine

# Fields that the source adds to a batch.
LENGTH, IS_REAL = 'length', 'is_real'
# How many groups are sorted together by `PaddedSequences.arrange`.
_GROUPS_SORTED = 16
# Part of the key that shuffles groups, so that it differs from the one that shuffles examples.
_SHUFFLE_GROUPS = 1


class PaddedSequences:
    """Examples with sequences of different lengths, in batches of a few static shapes.

    A batch is as long as the smallest of `lengths` that its longest sequence fits in. Besides the
    fields of the examples, (batch, ...), it has 'length', int32 (batch,), the number of elements of
    each sequence, and 'is_real', bool (batch, length), False for padding.

    Attributes:
        num_shapes: how many shapes batches may have.
        vocabulary: that of the items: see `data.tokens.TokenizedText`.
    """

    def __init__(
        self,
        items: Any,
        *,
        fields: Sequence[str],
        lengths: Sequence[int],
        fill: float | Mapping[str, float] = 0,
        truncate: bool = False,
        group: int | None = None,
    ):
        """Keeps the examples.

        Args:
            items: an object with a length, and items that are dicts of arrays; they may be nested.
                Its attribute `lengths`, if any, is how many elements the sequences of each item
                have, int (items,).
            fields: the fields that are padded, (n, ...) each, with the same n in an example; paths
                for nested examples. All other fields need one shape.
            lengths: lengths of batches, ascending. Each is compiled once.
            fill: value of padding, or one for each field; 0 for fields that it does not name.
            truncate: whether sequences longer than the last of `lengths` are cut off; otherwise
                they are an error.
            group: put so many sequences of similar length together, a few batches of them: most
                batches are then shorter. The lengths are those before any transform; without an
                attribute `lengths` of the items, all items are read once for them. None for random
                batches.

        Raises:
            ValueError: if there are no examples, or an argument is out of range.
        """
        if not len(items):
            raise ValueError('the source has no examples')
        if isinstance(fields, str) or not fields:
            raise ValueError(f"fields: {fields!r}; expected names of fields, such as ('tokens',)")
        lengths = [int(length) for length in lengths]
        if not lengths or sorted(set(lengths)) != lengths or lengths[0] < 1:
            raise ValueError(f'lengths: {lengths}; expected positive numbers, ascending')
        named = fill if isinstance(fill, Mapping) else dict.fromkeys(fields, fill)
        if unknown := sorted(named.keys() - set(fields)):
            raise ValueError(f'fill: {unknown[0]!r} is not among the fields {", ".join(fields)}')
        self.num_shapes = len(lengths)
        self.vocabulary: str | None = getattr(items, 'vocabulary', None)
        self._items = items
        self._fields = tuple(fields)
        self._lengths = lengths
        self._fill = dict(named)
        self._truncate = truncate
        self._group = group
        self._sizes: np.ndarray | None = None
        if group is not None:
            if group < 1:
                raise ValueError(f'group: {group}; expected a positive number of examples, or None')
            self._sizes = self._count_all(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        """Returns one example, as in the items."""
        return self._items[index]

    def arrange(self, order: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Returns the examples of an epoch with those of similar length together.

        Some thousand examples are sorted at a time, so that groups differ from epoch to epoch, and
        the groups are shuffled.

        Args:
            order: int64 (examples,), shuffled.
            seed: seed of the order.
            epoch: number of the epoch.
        """
        if self._group is None or self._sizes is None:
            return order
        window = np.arange(len(order)) // (_GROUPS_SORTED * self._group)
        # A stable sort by window, then length: examples of one length stay shuffled.
        order = order[np.lexsort((self._sizes[order], window))]
        group = np.arange(len(order)) // self._group
        keys = combine(seed, epoch, _SHUFFLE_GROUPS, np.arange(group[-1] + 1))
        return order[np.argsort(keys[group], kind='stable')]

    def collate(self, examples: list[Any], rows: int) -> dict[str, Any]:
        """Returns a batch of `rows` examples; those of padding repeat the first.

        Raises:
            ValueError: if a sequence is too long, or examples do not belong together.
        """
        # Not zeros: dividing by the norm or the length of an empty sequence gives NaN.
        examples = [*examples, *[examples[0]] * (rows - len(examples))]
        counts = np.array([self._count(example) for example in examples], np.int32)
        length = next((x for x in self._lengths if x >= counts.max()), None)
        if length is None:
            if not self._truncate:
                raise ValueError(
                    f'a sequence has {counts.max()} elements, and the last of `lengths` is '
                    f'{self._lengths[-1]}: add a larger one, or set truncate=True'
                )
            length = self._lengths[-1]
            counts = np.minimum(counts, length)

        def join(name: str, *arrays: Any) -> np.ndarray:
            if name in self._fields:
                fill = self._fill.get(name, 0)
                arrays = tuple(_pad(np.asarray(x)[:length], length, fill) for x in arrays)
            arrays = tuple(map(np.asarray, arrays))
            kinds = {(_kind(x.dtype), x.shape) for x in arrays}
            if len(kinds) > 1:
                found = ', '.join(sorted(f'{dtype} {shape}' for dtype, shape in kinds))
                raise ValueError(
                    f'{name!r} is {found} in examples of one batch; add it to the `fields` that '
                    f'are padded ({", ".join(self._fields)}), or give it one dtype and shape'
                )
            return np.stack(arrays)

        batch = map_named(join, *examples)
        for name in (LENGTH, IS_REAL):
            if name in batch:
                raise ValueError(
                    f'the field name {name!r} is that of a field of the batch that this source '
                    'adds; rename the field'
                )
        is_real = np.arange(length) < counts[:, None]
        return {**batch, LENGTH: counts, IS_REAL: is_real}

    def _count_all(self, items: Any) -> np.ndarray:
        """Returns the lengths of the sequences of all items, int (items,)."""
        known = getattr(items, 'lengths', None)
        if known is None:
            return np.array([self._count(items[i]) for i in range(len(items))])
        sizes = np.asarray(known)
        if sizes.shape != (len(items),):
            raise ValueError(
                f'the attribute `lengths` of the items has shape {sizes.shape}; expected a number '
                f'for each of {len(items)}'
            )
        return sizes

    def _count(self, example: Any) -> int:
        """Returns the length of the sequences of an example."""
        if not isinstance(example, Mapping):
            raise ValueError(f'an example is a {type(example).__name__}; expected a dict of arrays')
        lengths = {}
        for name in self._fields:
            if not has_field(example, name):
                raise ValueError(f'an example has no field {name!r}; it has {", ".join(example)}')
            lengths[name] = len(get_field(example, name))
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f'the sequences of an example differ in length: {lengths}; all `fields` need the '
                'same number of elements'
            )
        return next(iter(lengths.values()))


def _kind(dtype: np.dtype[Any]) -> Any:
    # The dtype of text includes its length, which may differ.
    return dtype.kind if dtype.kind in 'SU' else dtype


def _pad(x: np.ndarray, length: int, fill: float) -> np.ndarray:
    padding = np.full((length - len(x), *x.shape[1:]), fill, x.dtype)
    return np.concatenate([x, padding])
