# SPDX-License-Identifier: Apache-2.0
"""The random generators of the whole process."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trainer.data import global_random


def test_one_number_seeds_all_of_them() -> None:
    with global_random.restore_after():
        drawn = []
        for number in (2**32 - 1, 0, 2**32 - 1):
            global_random.seed(number)
            drawn.append((random.random(), np.random.random()))
    assert drawn[0] == drawn[2] != drawn[1]


def test_they_are_restored_after_an_error() -> None:
    before = global_random.states()
    with pytest.raises(OverflowError), global_random.restore_after():
        random.random()
        np.random.normal()
        assert global_random.changed_since(before) == ['random', 'numpy.random']
        raise OverflowError
    assert global_random.changed_since(before) == []
    with global_random.restore_after():  # The lock is free again.
        pass


def test_a_single_draw_changes_the_state() -> None:
    with global_random.restore_after():
        before = global_random.states()
        # A normal draw leaves a second number behind, and so does not move the generator twice.
        np.random.normal()
        assert global_random.changed_since(before) == ['numpy.random']
        before = global_random.states()
        np.random.normal()
        assert global_random.changed_since(before) == ['numpy.random']


def test_pytorch_takes_part_if_it_is_imported() -> None:
    torch = pytest.importorskip('torch')
    before = global_random.states()
    with global_random.restore_after():
        global_random.seed(3)
        first = torch.rand(4)
        assert 'torch' in global_random.changed_since(before)
        global_random.seed(3)
        assert torch.equal(torch.rand(4), first)
    assert global_random.changed_since(before) == []
