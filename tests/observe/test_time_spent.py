# SPDX-License-Identifier: Apache-2.0
"""The time spent in each part of a run."""

from __future__ import annotations

import re
import time

import pytest

from trainer.observe.time_spent import TimeSpent


def test_time_adds_up_by_part_even_when_the_part_fails() -> None:
    spent = TimeSpent()
    with spent.measure('eval'):
        time.sleep(0.02)
    with pytest.raises(KeyError), spent.measure('eval'):
        time.sleep(0.02)
        raise KeyError
    spent.set('data wait', 75.0)
    assert 0.04 <= spent.get('eval') <= spent.total() < 5
    assert spent.get('save') == 0.0
    assert re.fullmatch(r'total \d\.\d s: eval \d\.\d s, data wait 1:15', spent.summary())
