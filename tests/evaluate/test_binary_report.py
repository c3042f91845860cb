# SPDX-License-Identifier: Apache-2.0
"""`BinaryReport`: its ranks, and the mistakes that it shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from trainer.config.errors import UserError
from trainer.scores import BinaryReport

TEXTS = np.array(['a', 'b', 'c', 'd', 'e'])
LABELS = np.array([1, 0, 1, 0, 1], 'i4')
PROBABILITIES = np.array([[0.9], [0.8], [0.1], [0.2], [0.4]], 'f4')
EXAMPLES: dict[str, Any] = {'probabilities': PROBABILITIES, 'label': LABELS, 'text': TEXTS}


def test_the_worst_mistakes_are_first() -> None:
    values = BinaryReport(count=2)(EXAMPLES)
    assert values['auc'] == sklearn.metrics.roc_auc_score(LABELS, PROBABILITIES[:, 0])
    precision = sklearn.metrics.average_precision_score(LABELS, PROBABILITIES[:, 0])
    assert values['average_precision'] == pytest.approx(precision)
    assert values['mistakes'].texts == ('0.100 for label 1: c', '0.800 for label 0: b')


def test_an_example_without_a_label_is_no_mistake() -> None:
    values = BinaryReport()({**EXAMPLES, 'label': np.array([-1, 0, 1, 0, -1], 'i4')})
    assert values['auc'] == 0.0
    assert values['mistakes'].texts == ('0.100 for label 1: c', '0.800 for label 0: b')


def test_without_mistakes() -> None:
    values = BinaryReport()({**EXAMPLES, 'label': (PROBABILITIES[:, 0] > 0.5).astype('i4')})
    assert values == {'auc': 1.0, 'average_precision': 1.0}


@pytest.mark.parametrize(
    ('examples', 'message'),
    [
        ({'class': LABELS}, r"no 'probabilities' among class.*loss='sigmoid'"),
        ({**EXAMPLES, 'probabilities': np.zeros((5, 2))}, r'is \[5, 2\].* one decision for each'),
    ],
)
def test_predictions_that_do_not_fit(examples: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BinaryReport()(examples)
