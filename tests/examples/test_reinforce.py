# SPDX-License-Identifier: Apache-2.0
"""The files on the pages about sources that make their batches with the model."""

from __future__ import annotations

import importlib
import pathlib
import re
import sys
from typing import Any

import ml_collections
import pytest

from tests.command import ROOT
from tests.small import one_device
from trainer.experiment import build
from trainer.trainer import Trainer


def write_module(page: str, name: str, tmp_path: pathlib.Path, patch: pytest.MonkeyPatch) -> Any:
    """Writes the file that a page shows, and imports it."""
    text = (ROOT / 'docs' / page).read_text()
    found = re.search(rf'```py(thon)?\n# {name}\n(.*?)```', text, re.DOTALL)
    assert found is not None
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(found[2])
    patch.syspath_prepend(str(tmp_path))
    for known in ('mine', 'mine.gaussian', 'mine.vowels'):
        patch.delitem(sys.modules, known, raising=False)
    return importlib.import_module(name.removesuffix('.py').replace('/', '.'))


def fit(config: Any) -> dict[str, Any]:
    trainer = Trainer(build(ml_collections.ConfigDict(config)), mesh=one_device(), verbose=False)
    return dict(trainer.fit().history)


def test_a_mean_moves_to_where_the_reward_is(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module('howto/collect.md', 'mine/gaussian.py', tmp_path, monkeypatch)
    history = fit({**module.get_config(), 'train_for': '60 steps', 'log': {'every': '2 steps'}})
    assert abs(history['train/mean'].values[0]) < 1.5
    assert abs(history['train/mean'].values[-1] - 3) < 0.5


@pytest.mark.slow
def test_a_language_model_learns_to_write_vowels(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = write_module('examples/reinforce.md', 'mine/vowels.py', tmp_path, monkeypatch)
    history = fit({**module.get_config(), 'train_for': '40 steps', 'log': {'every': '2 steps'}})
    rewards = history['train/reward'].values
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.5
