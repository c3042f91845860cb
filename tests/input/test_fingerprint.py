# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint knows of its data: a model of other tokens is refused."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.data.loader import TrainLoader
from trainer.data.sources import ArraySource
from trainer.input.data import TrainData
from trainer.input.fingerprint import check_vocabulary, data_changes, fingerprint


class Texts(ArraySource):
    """Two texts, in tokens of a vocabulary with this checksum."""

    def __init__(self, vocabulary: object, first: int = 1):
        super().__init__({'tokens': np.array([[first, 2], [3, 4]], np.int32)})
        self.vocabulary = vocabulary


def data(vocabulary: object, first: int = 1) -> TrainData:
    loader = TrainLoader(source=Texts(vocabulary, first), batch_size=2)
    return TrainData.from_loader(loader, 'config.data')


def test_tokens_of_another_vocabulary_are_refused() -> None:
    """Those of sources that state none are not compared."""
    before = fingerprint(data('a1'))
    message = (
        r'^step 4 is of a model of other tokens: the checksum .* was a1, that of the data is b2'
    )
    with pytest.raises(UserError, match=message):
        check_vocabulary(data('b2'), before, 'step 4')
    for now, then in (
        ('a1', before),
        (None, before),
        ('b2', fingerprint(data(None))),
        ('b2', None),
    ):
        check_vocabulary(data(now), then, 'step 4')


def test_a_vocabulary_that_is_no_checksum_is_not_compared() -> None:
    """Such as the words themselves, in a source of the user."""
    assert 'vocabulary' not in fingerprint(data({'the': 0}))


def test_another_first_example_is_a_change() -> None:
    before = fingerprint(data(None))
    assert data_changes(before, fingerprint(data(None))) == []
    assert data_changes(before, fingerprint(data(None, first=7))) == [
        'the first example differs in tokens'
    ]
