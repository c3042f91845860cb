# SPDX-License-Identifier: Apache-2.0
"""Several tasks for one model: labels that are missing, metrics of each part, and mistakes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from trainer.config.errors import UserError
from trainer.metrics import AUC, AveragePrecision, Pearson
from trainer.tasks import Classification, MultiTask, Regression
from trainer.tasks.collecting import compute_collected
from trainer.tasks.runner import TaskRunner, compute_metrics

NAN = np.nan
BATCH = {
    'x': np.array([[1.0], [-2.0], [3.0], [0.5], [9.0]], np.float32),
    'yes': np.array([1, 0, -1, 0, 1], np.int32),
    'number': np.array([NAN, 1.0, NAN, 2.0, 5.0], np.float32),
    # The last example is padding.
    '_mask': np.array([True, True, True, True, False]),
}
PARTS: dict[str, Any] = {
    'yes': Classification(inputs='x', label='yes', loss='sigmoid', ignore_label=-1),
    'number': Regression(inputs='x', targets='number', ignore_nan=True),
}


class Model:
    """Both outputs are those of a line; counts its calls."""

    training = False

    def __init__(self, slope: Any = 1.0):
        self.calls = 0
        self.slope = slope

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        self.calls += 1
        return {'yes': self.slope * x, 'number': self.slope * 2 * x[:, 0]}


def batch(**changes: Any) -> Any:
    return {name: jnp.asarray(x) for name, x in {**BATCH, **changes}.items()}


def measure(task: MultiTask, **changes: Any) -> dict[str, float]:
    """Returns the metrics of a batch, those on the host included."""
    runner = TaskRunner.from_task(task)
    output = runner(Model(), batch(**changes))
    found = compute_metrics(runner.measure(output)) if runner.metrics else {}
    is_real = np.asarray(BATCH['_mask'])
    for name, arrays in runner.collect(output).items():
        kept = {key: np.asarray(x)[is_real] for key, x in arrays.items()}
        found[name] = compute_collected(dict(runner.collecting)[name], kept)
    return {name: float(x) for name, x in found.items()}


def test_a_missing_label_counts_in_the_other_parts_only() -> None:
    found = measure(MultiTask(parts=PARTS, weights={'number': 0.5}))
    entropy = np.log1p(np.exp([-1.0, -2.0, 0.5]))
    square = np.square([-4.0 - 1.0, 1.0 - 2.0])
    assert found['yes_loss'] == pytest.approx(entropy.mean())
    assert found['yes_accuracy'] == pytest.approx(2 / 3)
    assert found['number_loss'] == pytest.approx(square.mean())
    assert found['number_mean_absolute_error'] == pytest.approx(3.0)
    # The third example has no label, and counts as an example.
    assert found['loss'] == pytest.approx((entropy.sum() + 0.5 * square.sum()) / 4)


def test_gradients_are_finite_where_labels_are_missing() -> None:
    def loss(slope: jax.Array) -> jax.Array:
        return MultiTask(parts=PARTS)(Model(slope), batch()).loss.sum()

    assert np.isfinite(jax.grad(loss)(jnp.float32(1.0)))


def test_the_model_is_called_once() -> None:
    model, task = Model(), MultiTask(parts=PARTS, keep=('number',))
    task(model, batch())
    assert model.calls == 1
    found = task.predict(model, batch())
    assert model.calls == 2
    assert set(found) == {'yes_classes', 'yes_probabilities', 'number_prediction', 'number'}


def test_metrics_of_all_examples_are_those_of_scikit_learn() -> None:
    """Each part has its own; missing labels and padding do not count."""
    rank = {'auc': AUC(), 'precision': AveragePrecision()}
    line = {'pearson': Pearson()}
    parts = {
        'yes': Classification(
            inputs='x', label='yes', loss='sigmoid', ignore_label=-1, extra_metrics=rank
        ),
        'number': Regression(inputs='x', targets='number', ignore_nan=True, extra_metrics=line),
    }
    changes = {'x': np.array([[1.0], [-2.0], [3.0], [1.5], [9.0]], np.float32)}
    found = measure(MultiTask(parts=parts), **changes)
    truth, scores = [1, 0, 0], [1.0, -2.0, 1.5]
    assert found['yes_auc'] == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores))
    precision = sklearn_metrics.average_precision_score(truth, scores)
    assert found['yes_precision'] == pytest.approx(precision)
    assert found['number_pearson'] == pytest.approx(1.0)


def test_ranks_of_several_decisions_are_means_over_those_with_labels() -> None:
    """As in the Open Graph Benchmark: a decision without a positive or a negative is left out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (40, 4)).astype(np.int32)
    labels[:, 3] = -1
    scores = rng.normal(size=labels.shape).astype(np.float32)
    for metric, theirs in (
        (AUC(skip_absent=True), sklearn_metrics.roc_auc_score),
        (AveragePrecision(skip_absent=True), sklearn_metrics.average_precision_score),
    ):
        made = metric.from_model_output(logits=jnp.asarray(scores), labels=jnp.asarray(labels))
        found = compute_collected(metric, {k: np.asarray(v[0]) for k, v in made.values.items()})
        each = [
            theirs(labels[labels[:, i] >= 0, i], scores[labels[:, i] >= 0, i]) for i in range(3)
        ]
        assert found == pytest.approx(np.mean(each))


def test_the_class_of_the_metrics_is_always_the_same() -> None:
    """It is part of the type of a state."""
    task = MultiTask(parts=PARTS)
    assert task.metrics.__annotations__ == MultiTask(parts=PARTS).metrics.__annotations__


def test_labels_of_each_part_are_checked() -> None:
    assert MultiTask(parts=PARTS)(Model(), batch()).checks.keys() == {'yes'}


def test_an_ensemble_combines_each_output_in_its_way() -> None:
    logits = jnp.array([[[-1.0]], [[3.0]]])
    combined = MultiTask(parts=PARTS).combine({'yes': logits, 'number': logits[..., 0]})
    np.testing.assert_allclose(
        jax.nn.sigmoid(combined['yes']), jax.nn.sigmoid(logits).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(combined['number'], [1.0])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="there is no part 'numbers'; the parts are yes, number"):
        MultiTask(parts=PARTS, weights={'numbers': 1.0})
    with pytest.raises(ValueError, match='expected tasks by name'):
        MultiTask(parts={'a b': PARTS['yes']})
    other = {**PARTS, 'third': Regression(inputs='x', targets='number')}
    with pytest.raises(UserError, match="expected a dict with an output for the part 'third'"):
        MultiTask(parts=other)(Model(), batch())
    other = {**PARTS, 'number': Regression(inputs='z', targets='number')}
    with pytest.raises(UserError, match=r'parts\.number: its inputs are not those of the first'):
        MultiTask(parts=other)(Model(), batch(z=BATCH['x']))
    tokens = {'yes': lambda model, batch: model(batch['x'])}
    with pytest.raises(UserError, match='expected one number for each example'):
        MultiTask(parts=tokens)(Model(), batch())
