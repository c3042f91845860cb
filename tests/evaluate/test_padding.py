# SPDX-License-Identifier: Apache-2.0
"""Predictions of batches of different lengths: padded, if something says what is padding."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests import ragged
from trainer import precompute
from trainer.config.errors import UserError
from trainer.evaluate.host_rows import AllRows, join_arrays, join_batches
from trainer.experiment import build
from trainer.trainer import Trainer


def test_arrays_of_other_lengths_are_padded() -> None:
    """At the end, with 0 or ''; arrays that do not belong together stay an error."""
    long, short = np.ones((2, 3, 1), np.int8), np.full((1, 2, 1), 2, np.int32)
    joined = join_arrays([long, short])
    assert joined[..., 0].tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 0]]
    assert joined.dtype == np.int32
    text = join_arrays([np.array([['a']]), np.array([['bc', 'd']])])
    assert text.tolist() == [['a', ''], ['bc', 'd']]
    np.testing.assert_array_equal(join_arrays([long, long]), np.concatenate([long, long]))
    with pytest.raises(ValueError, match='dimensions'):
        join_arrays([long, short[..., 0]])


def test_predictions_say_what_is_padding() -> None:
    """A padded 0 is not the class 0."""
    batches = [{'class': np.array([[1, 0, 1]])}, {'class': np.array([[1, 0]])}]
    message = r"'class' is \(examples, 2\) and \(examples, 3\), .*; return 'length' from predict"
    with pytest.raises(UserError, match=message):
        join_batches(batches)
    with_lengths = [{**batch, 'length': np.array([batch['class'].shape[1]])} for batch in batches]
    joined = join_batches(with_lengths)
    assert joined['class'].tolist() == [[1, 0, 1], [1, 0, 0]]
    assert joined['length'].tolist() == [3, 2]


@pytest.mark.parametrize(
    ('name', 'other', 'message'),
    [
        ('predicted/class', 'field/length', ''),
        ('field/tag', 'predicted/is_real', ''),
        ('predicted/class', 'field/label', 'or name it in score.fields'),
        ('collected/auc/labels', 'collected/auc/weights', ''),
        ('collected/auc/labels', 'field/is_real', 'let the metric collect'),
        ('predicted/class', 'collected/auc/length', 'or name it in score.fields'),
    ],
)
def test_what_says_what_is_padding(name: str, other: str, message: str) -> None:
    rows = AllRows(by_id=True)
    for number, length in enumerate((2, 3)):
        ones = np.ones((1, length))
        # A label has the same shape in all batches.
        rows.add(np.array([number]), {name: ones, other: ones[:, : 1 if 'label' in other else 3]})
    if message:
        with pytest.raises(UserError, match=message):
            rows.join()
    else:
        assert rows.join()[name].tolist() == [[1, 1, 0], [1, 1, 1]]


class TagEach(ragged.Tagging):
    """Predicts a tag for each token."""

    def predict(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {'tag': model(batch['tokens'], batch['is_real']).argmax(-1)}


def count_right(examples: Mapping[str, np.ndarray]) -> dict[str, int]:
    is_real = np.arange(examples['tag'].shape[1]) < examples['length'][:, None]
    return {'right': int((is_real & (examples['tag'] == examples['tags'])).sum())}


def trainer(*fields: str) -> Trainer:
    config = ragged.make_config(task={'target': f'{__name__}:TagEach'})
    config.evals.dev.score = dict(ref=f'{__name__}:count_right', fields=fields)
    config.evals.dev.data.batch_size = 3
    return Trainer(build(config))


@pytest.mark.slow
def test_a_score_of_sequences_needs_their_lengths() -> None:
    run = trainer('tags')
    with pytest.raises(UserError, match=r"evals\.dev: batches differ in length: '.*tags?' is"):
        run.evaluate(run.init_state())
    with_length = trainer('tags', 'length')
    measured = with_length.evaluate(with_length.init_state())['dev']
    words = sum(map(len, ragged.Sentences(21, 1).tokens))
    assert measured['right'] == pytest.approx(words * measured['accuracy'], abs=1e-3)


def test_features_in_a_file_need_one_length(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"precompute: batches differ in length: 'tag' is \(ex"):
        precompute(trainer('tags'), 'dev', tmp_path / 'features.npz')
    assert not (tmp_path / 'features.npz').exists()
