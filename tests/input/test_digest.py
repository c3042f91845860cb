# SPDX-License-Identifier: Apache-2.0
"""The data digest: depends on step, row and example, not on processes or calls."""

from __future__ import annotations

import re

import numpy as np
import pytest

from trainer.data.loader import TrainLoader
from trainer.data.sources import ArraySource
from trainer.input.digest import DataDigest

IDS = np.arange(24).reshape(6, 4) % 10


def digest(*parts: tuple[int, np.ndarray], rows: np.ndarray | None = None) -> str:
    total = DataDigest()
    for start, ids in parts:
        total.add(start, ids, rows)
    return total.value


def test_the_digest_of_no_batches() -> None:
    assert DataDigest().value == '0' * 16
    assert digest((0, IDS[:0])) == '0' * 16


def test_golden_value() -> None:
    """Digests of earlier runs must stay comparable."""
    assert digest((0, IDS)) == '48c4e05496e5b4b0'


def test_value_is_sixteen_digits() -> None:
    for step in range(100):
        assert re.fullmatch('[0-9a-f]{16}', digest((step, IDS[:1])))


@pytest.mark.parametrize('size', [1, 2, 4, 6])
def test_blocks_do_not_matter(size: int) -> None:
    parts = [(start, IDS[start : start + size]) for start in range(0, 6, size)]
    assert digest(*parts) == digest((0, IDS))
    assert digest(*parts[::-1]) == digest((0, IDS))


def test_every_change_of_order_matters() -> None:
    variants = [IDS]
    for a in range(24):
        for b in range(a):
            if IDS.flat[a] != IDS.flat[b]:
                swapped = IDS.copy()
                swapped.flat[[a, b]] = swapped.flat[[b, a]]
                variants.append(swapped)
    assert len({digest((0, ids)) for ids in variants}) == len(variants) > 200


def test_step_row_and_example_matter() -> None:
    changed = IDS.copy()
    changed[3, 2] = 99
    values = {
        digest((0, IDS)),
        digest((1, IDS)),
        digest((0, changed)),
        digest((0, IDS[:5])),
        digest((0, IDS), (5, IDS[5:])),
    }
    assert len(values) == 5


def test_processes_with_rows_of_their_own_add_up() -> None:
    """The digests of all processes are summed modulo 2^64."""
    whole = int(digest((0, IDS)), 16)
    for split in ([[0, 1], [2, 3]], [[3, 0], [1], [2]]):
        parts = [int(digest((0, IDS[:, rows]), rows=np.array(rows)), 16) for rows in split]
        assert sum(parts) % 2**64 == whole
    assert digest((0, IDS[:, 2:])) != digest((0, IDS[:, 2:]), rows=np.array([2, 3]))


def test_padding_does_not_count() -> None:
    padded = np.concatenate([IDS, np.full((6, 3), -1)], axis=1)
    assert digest((0, padded)) == digest((0, IDS))
    assert digest((0, np.full((2, 4), -1))) == '0' * 16


@pytest.mark.parametrize('stop', range(7))
def test_restore_continues_from_a_value(stop: int) -> None:
    again = DataDigest()
    again.restore(digest((0, IDS[:stop])))
    again.add(stop, IDS[stop:])
    assert again.value == digest((0, IDS))


def test_restore_discards_earlier_batches() -> None:
    again = DataDigest()
    again.add(0, IDS)
    again.restore('00000000000000ff')
    assert again.value == '00000000000000ff'


def test_loaders_of_the_same_seed_agree() -> None:
    def digest_of(size: int, seed: int) -> str:
        loader = TrainLoader(source=ArraySource({'x': np.zeros(50)}), batch_size=8, seed=seed)
        total = DataDigest()
        for start in range(0, 24, size):
            total.add(start, loader.block(start, size).ids)
        return total.value

    assert digest_of(1, 0) == digest_of(4, 0) == digest_of(24, 0) != digest_of(24, 1)
