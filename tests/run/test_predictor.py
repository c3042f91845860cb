# SPDX-License-Identifier: Apache-2.0
"""A run without its training: states, evaluations and predictions of a work directory."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from tests.step import tiny
from trainer.config.errors import UserError
from trainer.run.predictor import Predictor


def test_it_evaluates_what_a_trainer_has_saved(tmp_path: pathlib.Path) -> None:
    trainer = tiny.trainer(tmp_path / 'run')
    result = trainer.fit()
    predictor = Predictor(trainer.experiment, str(tmp_path / 'run'))
    assert predictor.evaluate() == trainer.evaluate(result.state)
    jax.tree.map(np.testing.assert_array_equal, predictor.restore().params, result.state.params)


def test_it_sets_up_once_and_writes_nothing(tmp_path: pathlib.Path) -> None:
    predictor = Predictor(tiny.trainer().experiment, str(tmp_path / 'run'))
    assert predictor.set_up() is predictor.set_up()
    assert predictor.mesh() is predictor.set_up().mesh
    assert int(predictor.init_state().step) == 0
    assert not (tmp_path / 'run').exists()
    with pytest.raises(UserError, match=r'no run in .*: the directory does not exist'):
        predictor.restore()
    with pytest.raises(UserError, match='this Trainer has no work directory'):
        Predictor(predictor.experiment).restore()
    with pytest.raises(UserError, match=r'predict\(state\): .* has no checkpoint; pass a state'):
        Predictor(predictor.experiment).predict('test')
