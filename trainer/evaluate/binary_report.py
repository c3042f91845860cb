# SPDX-License-Identifier: Apache-2.0
"""`BinaryReport`: how well a binary decision ranks, and the examples it is most wrong about."""

from __future__ import annotations

import dataclasses

import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.score import Examples
from trainer.observe.summaries import Texts
from trainer.tasks.scores import auc, average_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryReport:
    """AUC and average precision of a binary decision, and the examples it is most wrong about.

    For the task `trainer.tasks:Classification` with `loss='sigmoid'` and one logit. The score needs
    the fields `label` and `field`: name them in `evals.NAME.score.fields`. An example without a
    label (-1) does not count.

    Attributes:
        field: the field whose values are shown, such as the text.
        count: how many wrong examples are shown.
        label: field of the labels, 0 or 1.
        probability: prediction with the probability of label 1.
    """

    field: str = 'text'
    count: int = 10
    label: str = 'label'
    probability: str = 'probabilities'

    def __call__(self, examples: Examples) -> dict[str, float | Texts]:
        """Returns `auc`, `average_precision` and texts.

        They are `mistakes`, those with the least probable label first.

        Raises:
            UserError: if a prediction or field is missing, or there are several decisions.
        """
        for name in (self.probability, self.label, self.field):
            if name not in examples:
                raise UserError(
                    f'BinaryReport: no {name!r} among {", ".join(examples)}: use the task '
                    "trainer.tasks:Classification with loss='sigmoid', and "
                    f'score.fields=({self.label!r}, {self.field!r})'
                )
        label, probability = examples[self.label], examples[self.probability]
        if probability.size != len(label) or label.size != len(label):
            raise UserError(
                f'BinaryReport: {self.probability!r} is {list(probability.shape)} and '
                f'{self.label!r} is {list(label.shape)}; expected one decision for each example'
            )
        label, probability = label.ravel(), probability.ravel()
        wrong = np.flatnonzero(((probability > 0.5) != (label > 0.5)) & (label >= 0))
        order = wrong[np.argsort(-np.abs(probability[wrong] - 0.5), kind='stable')]
        # Without one, an empty text would be written.
        shown = [
            f'{probability[i]:.3f} for label {int(label[i])}: {examples[self.field][i]}'
            for i in order[: self.count]
        ]
        mistakes = {'mistakes': Texts(shown)} if shown else {}
        return {
            'auc': auc(label, probability),
            'average_precision': average_precision(label, probability),
            **mistakes,
        }
