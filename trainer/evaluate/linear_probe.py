# SPDX-License-Identifier: Apache-2.0
"""`LinearProbe`: the accuracy of a linear classifier trained on a few examples of each class."""

from __future__ import annotations

import dataclasses

import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.score import Examples

# Penalties to choose from, in units of the largest squared singular value of the features.
_PENALTIES = 10.0 ** np.arange(-6, 2.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Accuracy of a ridge regression on features of a few examples of each class.

    For the data of `trainer.data.few_shot:FewShot` and the task `trainer.tasks:Features` with
    `keep=('label', 'shot')`. The regression has a closed form, so the probe takes a moment and has
    nothing to tune.

    Attributes:
        shots: numbers of training examples of each class; each is a result of its own, such as
            `5_shot`.
        features: name of the features among the predictions, (examples, ...).
        label: prediction with the class, integers (examples,).
        shot: prediction with the number of a training example within its class, and -1 for
            examples to be classified.
    """

    shots: tuple[int, ...] = (1, 5, 10)
    features: str = 'features'
    label: str = 'label'
    shot: str = 'shot'

    def __post_init__(self) -> None:
        if not self.shots or any(type(k) is not int or k < 1 for k in self.shots):
            raise ValueError(f'shots: {self.shots}; expected a tuple of positive integers')

    def __call__(self, examples: Examples) -> dict[str, float]:
        """Returns the accuracy for each of `shots`; NaN if a feature is not finite.

        Raises:
            UserError: if a prediction is missing, or there are fewer training examples of
                each class than `shots`.
        """
        for name in (self.features, self.label, self.shot):
            if name not in examples:
                raise UserError(
                    f'LinearProbe: no {name!r} among the predictions, {", ".join(examples)}: use '
                    f'the task trainer.tasks:Features with keep=({self.label!r}, {self.shot!r})'
                )
        shot, label = examples[self.shot], examples[self.label]
        features = examples[self.features].reshape(len(label), -1).astype(np.float64)
        available = int(shot.max()) + 1
        if max(self.shots) > available:
            raise UserError(
                f'LinearProbe: shots={self.shots}, but the data has {available} training examples '
                'of each class: set `shots` of trainer.data.few_shot:FewShot'
            )
        if not np.isfinite(features).all():
            return {f'{k}_shot': np.nan for k in self.shots}
        query = shot < 0
        accuracy = {}
        for k in self.shots:
            seen = ~query & (shot < k)
            classes = classify(features[seen], label[seen], features[query])
            accuracy[f'{k}_shot'] = float((classes == label[query]).mean())
        return accuracy


def classify(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the classes of examples, by ridge regression on others.

    Targets are 1 for the class of an example and 0 for the other classes. Of several penalties, the
    one with the least squared error in leave-one-out cross-validation is used, which needs no
    further fit.

    Args:
        features: of the training examples, float64 (n, width).
        labels: their classes, integers (n,).
        queries: features of the examples to be classified, float64 (m, width).
    """
    classes, target = np.unique(labels, return_inverse=True)
    y = np.eye(len(classes))[target]
    mean, std = features.mean(axis=0), features.std(axis=0)
    # A constant feature has no information, and its deviation of 0 must not be a divisor.
    scale = np.where(std > 0, std, 1.0)
    x = (features - mean) / scale
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rotated = u.T @ (y - y.mean(axis=0))
    best, error = None, np.inf
    for penalty in _PENALTIES * max(np.square(s).max(), np.finfo(float).tiny):
        shrunk = np.square(s) / (np.square(s) + penalty)
        residual = y - y.mean(axis=0) - u @ (shrunk[:, None] * rotated)
        # What the residual would be if the example had not been seen. The mean is fitted, too.
        leverage = np.square(u) @ shrunk + 1 / len(x)
        loo = np.square(residual / np.maximum(1 - leverage, 1e-12)[:, None]).sum()
        if loo < error:
            best, error = (s / (np.square(s) + penalty))[:, None] * rotated, loo
    assert best is not None
    outputs = (queries - mean) / scale @ (vt.T @ best) + y.mean(axis=0)
    return classes[outputs.argmax(axis=1)]
