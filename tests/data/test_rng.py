# SPDX-License-Identifier: Apache-2.0
"""Random numbers of examples: their distribution, and values that must never change."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.rng import ExampleRng


def rng(n: int, stream: int = 0) -> ExampleRng:
    return ExampleRng(0, stream, np.zeros(n, np.int64), np.arange(n))


def test_draws_are_uniform_and_independent() -> None:
    random = rng(100_000)
    first, second = random.uniform(), random.uniform()
    for draw in (first, second, rng(100_000, stream=1).uniform()):
        assert draw.mean() == pytest.approx(0.5, abs=0.005)
        assert draw.var() == pytest.approx(1 / 12, abs=0.002)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    assert abs(np.corrcoef(first, rng(100_000, stream=1).uniform())[0, 1]) < 0.015
    normal = random.normal((2,))
    assert normal.shape == (100_000, 2)
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert set(random.integers(2, 5).tolist()) == {2, 3, 4}


def test_draws_within_a_row_are_uniform_too() -> None:
    drawn = rng(1000).uniform((10, 10))
    assert drawn.shape == (1000, 10, 10)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.005)
    assert drawn.var() == pytest.approx(1 / 12, abs=0.002)
    assert len(np.unique(drawn)) == 100_000


def test_normal_draws() -> None:
    drawn = rng(100_000).normal()
    assert np.isfinite(drawn).all()
    assert drawn.mean() == pytest.approx(0, abs=0.015)
    assert drawn.var() == pytest.approx(1, abs=0.025)
    assert (np.abs(drawn) > 1.96).mean() == pytest.approx(0.05, abs=0.004)


def test_integers_cover_their_range_evenly() -> None:
    for low, high in [(0, 1), (-3, 4), (5, 15)]:
        drawn = rng(100_000).integers(low, high)
        assert drawn.dtype == np.int64
        values, counts = np.unique(drawn, return_counts=True)
        assert values.tolist() == list(range(low, high))
        np.testing.assert_allclose(counts * (high - low) / 100_000, 1, atol=0.05)


def test_golden_draws() -> None:
    """The draws of a seed must never change: resumed runs depend on them."""
    assert rng(3).integers(0, 1000).tolist() == [699, 982, 352]
