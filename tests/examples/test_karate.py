# SPDX-License-Identifier: Apache-2.0
"""The example of a karate club: it learns the sides of 32 members from those of two."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from tests import command
from tests.pages import PAGES
from tests.tools.molecules_floor import score_distances
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'karate.py')


@pytest.mark.slow
def test_it_learns_the_sides() -> None:
    """31 of 32 when it was measured."""
    # The only example is the whole graph, so one device has all of it.
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ('data',), types, devices=jax.devices()[:1])
    result = Trainer(load_and_build(CONFIG, checkpoint__every='never'), mesh=mesh).fit()
    accuracy = result.metrics['eval/test/accuracy']
    assert accuracy * 32 == pytest.approx(round(accuracy * 32))
    assert accuracy > score_distances()
    assert np.isfinite(result.metrics['eval/test/loss'])


def test_the_floor_is_the_documented_one() -> None:
    assert score_distances() == 29 / 32
    for name in ('docs/examples/index', 'docs/examples/karate'):
        assert '90.6 %' in re.findall(r'\| ([\d.]+ %)', PAGES[name].text)
