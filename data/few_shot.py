# SPDX-License-Identifier: Apache-2.0
"""A few labeled examples of each class, together with the examples on which to test them."""

from __future__ import annotations

import numpy as np

from .sources import Arrays, ArraySpec, Source, join_vocabularies

# Labels are read this many at a time, because the fields read with them may be large.
_CHUNK = 1024


class FewShot:
    """A source of `shots` training examples of each class, followed by all test examples.

    They have the fields that both sources have, and `shot`, int32 (): the number of a training
    example within its class, from 0, and -1 for a test example. For an evaluation with the score
    `trainer.scores:LinearProbe`.

    Attributes:
        vocabulary: a checksum of the vocabulary of both sources; None if they have none.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        num_classes: int,
        shots: int = 10,
        label: str = 'label',
        seed: int = 0,
    ):
        """Chooses the training examples at random; fewer shots are the first ones of more.

        Args:
            train: source of the training examples.
            test: source of the test examples.
            num_classes: number of classes.
            shots: training examples of each class.
            label: field of the class, from 0.
            seed: determines the choice.

        Raises:
            ValueError: if the sources differ in their fields or vocabularies, or a class has too
                few examples.
        """
        if shots < 1:
            raise ValueError(f'shots: {shots}; expected a positive number')
        self._train, self._test = train, test
        self.vocabulary = join_vocabularies((train, test))
        shared = {name: x for name, x in train.spec.items() if test.spec.get(name) == x}
        if label not in shared or len(shared) < 2:
            raise ValueError(
                f'label: both sources need the field {label!r} and a further one, of the same '
                f'shapes and dtypes; they have {dict(train.spec)} and {dict(test.spec)}'
            )
        self.spec = {**shared, 'shot': ArraySpec((), np.dtype(np.int32))}
        self._chosen, self._shot = _choose(train, label, num_classes, shots, seed)

    def __len__(self) -> int:
        return len(self._chosen) + len(self._test)

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), each field as (n, ...)."""
        count = len(self._chosen)
        is_shot = indices < count
        batch = {name: np.zeros((len(indices), *x.shape), x.dtype) for name, x in self.spec.items()}
        batch['shot'][:] = -1
        batch['shot'][is_shot] = self._shot[indices[is_shot]]
        for source, rows, wanted in (
            (self._train, is_shot, self._chosen[indices[is_shot]]),
            (self._test, ~is_shot, indices[~is_shot] - count),
        ):
            # Not every source can read no examples.
            arrays = source.gather(wanted) if len(wanted) else {}
            for name in self.spec.keys() & arrays.keys():
                batch[name][rows] = arrays[name]
        return batch


def _choose(
    source: Source, label: str, num_classes: int, shots: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of `shots` examples of each class, and the number of each in its class.

    Both are int64 (num_classes x shots,), sorted by index.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(source))
    counts = np.zeros(num_classes, np.int64)
    chosen, numbers = [], []
    for start in range(0, len(order), _CHUNK):
        indices = order[start : start + _CHUNK]
        for index, value in zip(indices, source.gather(indices)[label].tolist(), strict=True):
            if 0 <= value < num_classes and counts[value] < shots:
                chosen.append(index)
                numbers.append(counts[value])
                counts[value] += 1
        # The rest of a large source is never read.
        if (counts == shots).all():
            by_index = np.argsort(chosen)
            return np.array(chosen)[by_index], np.array(numbers)[by_index]
    scarce = int(counts.argmin())
    raise ValueError(
        f'class {scarce} has only {counts[scarce]} training examples; expected {shots} or more'
    )
