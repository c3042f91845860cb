# SPDX-License-Identifier: Apache-2.0
"""A few examples of each class, followed by the test split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.data.few_shot import FewShot
from trainer.data.mnist import MNIST
from trainer.data.sources import ArraySource, RandomAccessSource


def source(labels: Any, first: int = 0, **more: Any) -> ArraySource:
    ids = np.arange(first, first + len(labels))
    return ArraySource({'id': ids, 'label': np.asarray(labels, np.int32), **more})


TRAIN = source([i % 3 for i in range(5000)])
TEST = source([0, 2], first=9000)


def everything(few: FewShot) -> Any:
    return few.gather(np.arange(len(few)))


def test_each_class_has_its_shots() -> None:
    few = FewShot(TRAIN, TEST, num_classes=3, shots=4)
    assert len(few) == 3 * 4 + 2
    batch = everything(few)
    assert batch['id'][12:].tolist() == [9000, 9001]
    assert batch['shot'][12:].tolist() == [-1, -1]
    for label in range(3):
        rows = np.flatnonzero(batch['label'][:12] == label)
        assert sorted(batch['shot'][rows].tolist()) == [0, 1, 2, 3]
    assert len(set(batch['id'].tolist())) == 14
    assert batch['label'][:12].tolist() == [i % 3 for i in batch['id'][:12]]
    assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in few.spec.items()
    }


def test_any_rows_in_any_order() -> None:
    few = FewShot(TRAIN, TEST, num_classes=3, shots=2)
    whole = everything(few)
    for indices in ([7, 0, 6, 0], [0, 1], [6, 7], [5]):
        rows = few.gather(np.array(indices))
        for name, x in whole.items():
            np.testing.assert_array_equal(rows[name], x[indices])


def test_the_seed_determines_the_choice_and_fewer_shots_are_the_first() -> None:
    def choose(shots: int, seed: int = 0) -> dict[tuple[int, int], int]:
        few = everything(FewShot(TRAIN, TEST, num_classes=3, shots=shots, seed=seed))
        keys = zip(few['label'].tolist(), few['shot'].tolist(), strict=True)
        pairs = zip(keys, few['id'].tolist(), strict=True)
        return {key: index for key, index in pairs if key[1] >= 0}

    assert choose(5) == choose(5)
    assert choose(5).items() >= choose(2).items()
    assert choose(5) != choose(5, seed=1)


def test_a_large_source_is_not_read_to_its_end() -> None:
    read = []

    class Counted(ArraySource):
        def gather(self, indices: np.ndarray) -> Any:
            read.append(len(indices))
            return super().gather(indices)

    images = MNIST('train').gather(np.arange(20_000))
    FewShot(Counted(images), MNIST('test'), num_classes=10, shots=10)
    assert sum(read) == 1024


def test_sources_that_cannot_read_nothing() -> None:
    items = [{'x': np.float32(i), 'label': np.int32(i % 2)} for i in range(6)]
    few = FewShot(RandomAccessSource(items), RandomAccessSource(items), num_classes=2, shots=1)
    assert few.gather(np.array([0]))['shot'].tolist() == [0]
    assert few.gather(np.array([2]))['x'].tolist() == [0]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'shots': 0}, 'shots: 0; expected a positive number'),
        ({'num_classes': 4}, 'class 3 has only 0 training examples; expected 10 or more'),
        ({'num_classes': 3, 'shots': 1700}, 'class 2 has only 1666 training examples; expected 17'),
        ({'label': 'class'}, "both sources need the field 'class' and a further one"),
    ],
)
def test_what_cannot_be_chosen(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShot(TRAIN, TEST, **{'num_classes': 3, **options})
