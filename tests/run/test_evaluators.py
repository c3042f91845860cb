# SPDX-License-Identifier: Apache-2.0
"""Evaluating and predicting arrays: exact, with the task and transforms of an evaluation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.evaluate import scored
from tests.in_memory import HERE, Net, Points, make_config, points
from tests.marks import slow_after
from trainer import Trainer, build
from trainer.config.errors import UserError
from trainer.step.state import TrainState


def double(batch: dict[str, Any]) -> dict[str, Any]:
    """A transform of an evaluation."""
    return {**batch, 'x': 2 * batch['x']}


def evals(**changes: Any) -> dict[str, Any]:
    source = dict(target=f'{HERE}:Points', n=21, seed=1)
    return dict(every='never', data=dict(source=source, batch_size=16, **changes))


def losses(state: TrainState, arrays: dict[str, np.ndarray], scale: float = 1.0) -> np.ndarray:
    """Returns the loss of each row, without the trainer."""
    logits = Net().apply({'params': state.params}, scale * arrays['x'])
    log_probs = jax.nn.log_softmax(logits)
    return -np.take_along_axis(np.asarray(log_probs), arrays['label'][:, None], 1)[:, 0]


# These do not fill the batches of 16 rows, nor the 8 devices.
@pytest.mark.parametrize('rows', slow_after(1, [37, 1]))
def test_arrays_are_evaluated_exactly(rows: int) -> None:
    trainer = Trainer(build(make_config()))
    state, arrays = trainer.init_state(), points(rows)
    found = trainer.evaluate(state, data=arrays)
    assert found['examples'] == rows
    np.testing.assert_allclose(found['loss'], losses(state, arrays).mean(), rtol=1e-5)


def test_predictions_of_arrays_are_those_of_all_rows_in_order() -> None:
    trainer = Trainer(build(make_config()))
    state, arrays = trainer.init_state(), points(37)
    del arrays['label']  # The task needs it only for the loss.
    found = trainer.predict(arrays, state)
    expected = Net().apply({'params': state.params}, arrays['x'])
    assert set(found) == {'logits'}
    np.testing.assert_allclose(found['logits'], np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_the_split_of_the_config_gives_its_own_metrics_as_arrays_and_as_source() -> None:
    trainer = Trainer(build(make_config()))
    state = trainer.init_state()
    own = trainer.evaluate(state)['dev']
    assert trainer.evaluate(state, data=points(21, seed=1)) == own
    assert trainer.evaluate(state, data=Points(21, seed=1)) == own
    assert trainer.evaluate(state, data=jax.tree.map(jax.numpy.asarray, points(21, seed=1))) == own
    assert trainer.evaluate(state, evaluation='dev') == {'dev': own}
    batches = list(trainer.predict('dev', state))
    logits = np.concatenate([batch['logits'] for batch in batches])
    np.testing.assert_array_equal(trainer.predict(points(21, seed=1), state)['logits'], logits)


def test_a_named_evaluation_gives_its_transforms() -> None:
    transforms = (dict(ref=f'{__name__}:double'),)
    config = make_config(evals=dict(plain=evals(), twice=evals(transforms=transforms)))
    trainer = Trainer(build(config))
    state, arrays = trainer.init_state(), points(10)
    for name, scale in (('plain', 1.0), ('twice', 2.0)):
        found = trainer.evaluate(state, data=arrays, evaluation=name)
        np.testing.assert_allclose(found['loss'], losses(state, arrays, scale).mean(), rtol=1e-5)
    with pytest.raises(UserError, match=r"several evaluations \(plain, twice\); .*'plain'"):
        trainer.evaluate(state, data=arrays)
    with pytest.raises(UserError, match=r"no evaluation 'plian'\. Did you mean 'plain'\?"):
        trainer.predict(arrays, state, evaluation='plian')
    with pytest.raises(UserError, match=r"no evaluation 'plian'\. Did you mean 'plain'\?"):
        trainer.predict('plian', state)


def test_without_evaluations_arrays_are_evaluated_like_training_data() -> None:
    config = make_config(evals={})
    config.data.transforms = (dict(ref=f'{__name__}:double'),)
    trainer = Trainer(build(config))
    state, arrays = trainer.init_state(), points(10)
    found = trainer.evaluate(state, data=arrays)
    np.testing.assert_allclose(found['loss'], losses(state, arrays, 2.0).mean(), rtol=1e-5)


def test_arrays_of_the_same_fields_compile_once() -> None:
    trainer = Trainer(build(make_config()))
    state = trainer.init_state()
    for rows in (5, 40):
        trainer.evaluate(state, data=points(rows))
    ((_, evaluator),) = trainer.set_up().other_data._kept.values()
    assert evaluator.compiles == 1
    wide = {**points(5), 'more': np.zeros(5)}
    assert trainer.evaluate(state, data=wide)['examples'] == 5


def test_a_score_of_the_evaluation_is_computed_for_arrays_too() -> None:
    trainer = Trainer(build(scored.get_config('score')))
    state = trainer.init_state()
    arrays = scored.Points(n=30, seed=5).gather(np.arange(30))
    assert trainer.evaluate(state, data=arrays).keys() == trainer.evaluate(state)['dev'].keys()


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (np.zeros(3), r'evaluate\(data\): expected a dict of arrays.*got a ndarray'),
        ({'x': np.zeros((3, 4)), 'label': np.zeros(2)}, 'same positive length'),
        ({'x': np.zeros((0, 4))}, 'same positive length'),
        ({}, 'same positive length'),
        ([{'x': np.zeros(4), 'label': 0}], r'evaluate\(data\): got a list of dicts'),
        ({'target': 'a:B', 'n': 3}, r'evaluate\(data\): got the description of an object'),
        ({'y': np.zeros((3, 4))}, r'evaluate\(data\): .*x'),
    ],
)
def test_other_data_is_refused_with_a_sentence(data: Any, message: str) -> None:
    trainer = Trainer(build(make_config()))
    with pytest.raises(UserError, match=message):
        trainer.evaluate(trainer.init_state(), data=data)
