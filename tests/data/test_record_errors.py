# SPDX-License-Identifier: Apache-2.0
"""A source that raises StopIteration before its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.in_memory import ArraySource
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import EvalLoader, TrainLoader


class Ending(ArraySource):
    """A source whose example 7 is missing."""

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if 7 in indices:
            raise StopIteration
        return super().gather(indices)


@pytest.mark.parametrize('make', [TrainLoader, EvalLoader, GrainLoader])
def test_a_source_that_ends_early_is_named(make: Any) -> None:
    source = Ending({'label': np.arange(20)})
    options = {} if make is EvalLoader else {'shuffle': False}
    loader = make(source=source, batch_size=4, **options)
    assert loader.block(0, 1).arrays['label'].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(Exception, match='the source has ended before the number of its') as caught:
        loader.block(1, 1)
    text = str(caught.value) + ''.join(getattr(caught.value, '__notes__', ()))
    assert 'while reading example 7 of the source Ending' in text
