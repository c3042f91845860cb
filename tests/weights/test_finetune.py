# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning real weights on real text: the config of docstrings."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests.command import ROOT
from tests.weights.examples import assert_same
from tests.weights.test_bert import model_directory
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

pytest.importorskip('tokenizers')

SMALL: dict[str, Any] = {
    'vars__length': 32, 'data__source__limit': 256, 'evals__test__data__source__limit': 128,
    'evals__test__every': 'never', 'checkpoint__every': 'never',
}  # fmt: skip


def docstrings(**options: Any) -> Trainer:
    options = {**SMALL, 'vars__encoder': str(model_directory()), **options}
    return Trainer(load_and_build(str(ROOT / 'configs' / 'docstrings.py'), **options))


@pytest.mark.slow
def test_a_new_head_on_the_frozen_encoder() -> None:
    """It learns eight classes, and the encoder equals the loaded one, bit for bit."""
    trainer = docstrings(optimizer__freeze='encoder/.*', train_for='80 steps')
    before = jax.device_get(trainer.init_state().params)
    result = trainer.fit()
    after = jax.device_get(result.state.params)
    assert_same(after['encoder'], before['encoder'])
    assert not np.array_equal(after['head']['kernel'], before['head']['kernel'])
    slots = {x.shape for x in jax.tree.leaves(result.state.opt_state)}
    assert (384, 8) in slots and (30522, 384) not in slots
    # One in eight by chance.
    assert result.metrics['eval/test/accuracy'] > 0.55


@pytest.mark.slow
def test_the_whole_encoder_learns_faster() -> None:
    """With a small learning rate for the encoder, 30 steps are better than from scratch."""
    tuned = docstrings(train_for='30 steps').fit()
    options = {'init_from': None, 'optimizer__lr_multipliers': None}
    fresh = docstrings(train_for='30 steps', optimizer__learning_rate__peak_value=3e-4, **options)
    alone = fresh.fit().metrics['eval/test/accuracy']
    assert tuned.metrics['eval/test/accuracy'] > alone + 0.2


@pytest.mark.slow
def test_a_missing_directory_of_weights_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r'tokenizer: no file all-MiniLM-L6-v2'):
        load_and_build(str(ROOT / 'configs' / 'docstrings.py'))
