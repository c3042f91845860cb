# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import clu.metrics
import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError
from trainer.modules.ensemble_outputs import mean_sigmoid, mean_softmax
from trainer.tasks import returned
from trainer.tasks.checks import Check
from trainer.tasks.extra_metrics import add_to_means
from trainer.tasks.task import Batch, TaskOutput

# Names of predictions.
_PREDICTED = {'class', 'probability', 'classes', 'probabilities'}

# The end of the message for a label out of range: the reason, and the fix.
_NO_OR_YES = (
    'A label per class is a number from 0 (no) to 1 (yes): fix the data, or set ignore_label'
)
_CLASSES = (
    'The model returns {classes} logits. Fix the data or the number of outputs; a value that marks '
    'unlabeled examples belongs in config.task.ignore_label'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy over classes, with one label per example (softmax) or per class (sigmoid).

    A label out of range stops the run with an error that names the example, unless it is
    `ignore_label`.

    Attributes:
        inputs: batch key of the model's input.
        label: batch key of the labels: integers (batch, ...), or one number for each class in
            (batch, ..., classes): one-hot, probabilities, or with 'sigmoid' any number of ones.
            For one logit with 'sigmoid', 0 or 1 (batch, ...).
        weight: batch key of per-example weights, or None.
        loss: 'softmax', or 'sigmoid' for a binary decision per class: the loss is their sum, the
            accuracy their mean.
        label_smoothing: mass moved from the label to all classes, in [0, 1).
        top_k: also report `top{k}_accuracy` for each of these k.
        ignore_label: the label of unlabeled examples, such as -1, which are left out of losses and
            metrics. With 'sigmoid' and labels for each class, only that class is left out.
        keep: batch keys of fields that `predict` returns, too, such as ids or text.
        extra_metrics: metrics by name, such as `trainer.metrics:F1`. They may read the outputs
            `logits` and `labels` (integers, or 0 and 1 for each class with 'sigmoid').
    """

    inputs: str = 'image'
    label: str = 'label'
    weight: str | None = None
    loss: Literal['softmax', 'sigmoid'] = 'softmax'
    label_smoothing: float = 0.0
    top_k: tuple[int, ...] = ()
    ignore_label: int | None = None
    keep: tuple[str, ...] = ()
    extra_metrics: Mapping[str, type[clu.metrics.Metric]] = dataclasses.field(
        default_factory=dict, hash=False
    )

    def __post_init__(self) -> None:
        if self.loss not in ('softmax', 'sigmoid'):
            raise ValueError(f"loss: expected 'softmax' or 'sigmoid', got {self.loss!r}")
        if self.loss == 'sigmoid' and self.top_k:
            raise ValueError(
                "top_k: not available with loss='sigmoid', which does not rank classes"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f'label_smoothing: expected a number from 0 to below 1, got {self.label_smoothing}'
            )
        if not isinstance(self.top_k, tuple) or not all(type(k) is int for k in self.top_k):
            raise ValueError(f'top_k: expected a tuple of integers such as (5,), got {self.top_k}')
        if any(k < 1 for k in self.top_k):
            raise ValueError(f'top_k: expected integers of at least 1, got {self.top_k}')
        if not isinstance(self.keep, tuple) or set(self.keep) & _PREDICTED:
            raise ValueError(
                f'keep: expected a tuple of batch keys, none of which is the name of a prediction '
                f'({", ".join(sorted(_PREDICTED))}), got {self.keep!r}'
            )
        add_to_means(self._means, self.extra_metrics)

    @property
    def _means(self) -> tuple[str, ...]:
        return ('loss', 'accuracy', *(f'top{k}_accuracy' for k in self.top_k))

    @property
    def metrics(self) -> type[clu.metrics.Collection]:
        """loss, accuracy, the top-k accuracies, each weighted like the loss, and extra metrics."""
        return add_to_means(self._means, self.extra_metrics)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Returns per-example losses and hits.

        Raises:
            UserError: if shapes or dtypes of labels and logits do not match.
        """
        logits = self._logits(model, batch)
        labels = batch[self.label]
        if self.loss == 'sigmoid' and logits.shape == (*labels.shape, 1):
            labels = labels[..., None]  # A binary decision, with its label as (batch, ...).
        self._check_shapes(logits, labels)
        # Converted before the comparison with `ignore_label`, which may not fit into their dtype.
        labels = labels.astype(jnp.int32 if labels.ndim < logits.ndim else jnp.float32)
        ignored = None if self.ignore_label is None else labels == self.ignore_label
        # The loss of an out-of-range label can be NaN, and weight 0 would not remove that from the
        # gradient. So ignored labels become class 0.
        safe = labels if ignored is None else jnp.where(ignored, 0, labels)
        measure = self._sigmoid if self.loss == 'sigmoid' else self._softmax
        loss, hits = measure(logits, safe, ignored)
        if self.extra_metrics:
            hits.update(logits=logits, labels=self._metric_labels(logits, safe, ignored))
        weights = None if self.weight is None else batch[self.weight]
        if ignored is not None:
            # With labels per class, an example counts if any of its labels does.
            counts = ~ignored if ignored.ndim < logits.ndim else ~ignored.all(-1)
            weights = _mask_weights(counts, weights)
        per_class = labels.ndim == logits.ndim
        high, why = (1, _NO_OR_YES) if per_class else (logits.shape[-1] - 1, _CLASSES)
        why = why.format(classes=logits.shape[-1])
        check = Check(labels, 0, high, ignored=self.ignore_label, why=why)
        return TaskOutput(loss=loss, weights=weights, metrics=hits, checks={self.label: check})

    def _logits(self, model: Callable[..., Any], batch: Batch) -> jax.Array:
        output = model(batch[self.inputs])
        if not isinstance(output, jax.Array):
            output = returned.require_array(output, self, 'logits')
        # In half precision, the log-sum-exp of the loss would lose digits.
        return output.astype(jnp.float32)

    def _check_shapes(self, logits: jax.Array, labels: jax.Array) -> None:
        """Checks, while the step is traced, that shapes and dtypes of labels and logits match."""
        per_class = labels.shape == logits.shape and logits.ndim > 1
        per_example = labels.shape == logits.shape[:-1]
        integers = not jnp.issubdtype(labels.dtype, jnp.inexact)
        name, kind = f'batch[{self.label!r}]', f'{labels.dtype}{list(labels.shape)}'
        classes = logits.shape[-1] if logits.ndim else 0
        if not per_class and not (per_example and integers):
            hint = ''
            if labels.shape == (*logits.shape[:-1], 1):
                hint = '. The labels have one dimension too many: remove it in a data transform'
            elif per_example:
                hint = '. Class indices must be integers: convert them in a data transform'
            raise UserError(
                f'config.task: {name} is {kind}, and the model returns {list(logits.shape)}: '
                f'expected integers {list(logits.shape[:-1])} (class indices) or '
                f'{list(logits.shape)} (one value per class){hint}'
            )
        if self.loss == 'softmax' and classes == 1:
            raise UserError(
                f'config.task: the model returns {list(logits.shape)}, one logit per example, '
                "whose softmax is always 1. Use loss='sigmoid' for binary classification"
            )
        if any(k > classes for k in self.top_k):
            raise UserError(
                f'config.task.top_k: {max(self.top_k)} exceeds the {classes} classes of the logits '
                f'{list(logits.shape)}'
            )
        if (
            self.ignore_label is not None
            and integers
            and not _can_represent(labels, self.ignore_label)
        ):
            raise UserError(
                f'config.task.ignore_label: {self.ignore_label} cannot occur, because {name} is '
                f'{kind}; use a value of that dtype, or convert the labels in a transform'
            )
        if per_class and self.ignore_label is not None and self.loss == 'softmax':
            raise UserError(
                f'config.task.ignore_label requires class indices; {name} has one value per class. '
                "Give such examples weight 0, or use loss='sigmoid'"
            )

    def _softmax(
        self, logits: jax.Array, labels: jax.Array, ignored: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        is_integer = labels.ndim < logits.ndim
        classes = labels if is_integer else labels.argmax(-1)
        if is_integer and not self.label_smoothing:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            target = optax.smooth_labels(_one_hot(labels, logits), self.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, target)
        hits = {'accuracy': logits.argmax(-1) == classes}
        if self.top_k:
            # A stable sort, so that no more than k classes count if logits are equal. A comparison
            # with the k-th largest logit would count all of them.
            best = jnp.argsort(-logits, axis=-1, stable=True)
            for k in self.top_k:
                hits[f'top{k}_accuracy'] = (best[..., :k] == classes[..., None]).any(-1)
        return loss, hits

    def _sigmoid(
        self, logits: jax.Array, labels: jax.Array, ignored: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        positive = _one_hot(labels, logits)
        # Each class is a binary decision, so smoothing moves mass between its two answers only.
        target = positive * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss = optax.sigmoid_binary_cross_entropy(logits, target)
        correct = (logits > 0) == (positive > 0.5)
        if ignored is None or ignored.ndim < logits.ndim:
            return loss.sum(-1), {'accuracy': correct.mean(-1)}
        # At least 1, because an example without any label would divide by 0; its weight is 0.
        counted = jnp.maximum((~ignored).sum(-1), 1)
        loss = jnp.where(ignored, 0.0, loss).sum(-1)
        return loss, {'accuracy': (correct & ~ignored).sum(-1) / counted}

    def _metric_labels(
        self, logits: jax.Array, labels: jax.Array, ignored: jax.Array | None
    ) -> jax.Array:
        """Returns the labels as metrics read them: classes or decisions, -1 where ignored."""
        if self.loss == 'sigmoid':
            labels = _one_hot(labels, logits)
        elif labels.ndim == logits.ndim:
            labels = labels.argmax(-1)
        if ignored is None:
            return labels
        return jnp.where(
            ignored.reshape(*ignored.shape, *[1] * (labels.ndim - ignored.ndim)), -1, labels
        )

    def combine(self, logits: jax.Array) -> jax.Array:
        """Returns the logits of the mean of the members' probabilities, for an ensemble.

        Args:
            logits: (members, batch, ..., classes).
        """
        return mean_sigmoid(logits) if self.loss == 'sigmoid' else mean_softmax(logits)

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, jax.Array]:
        """Returns the most probable class and its probability for each example, and `keep`.

        With 'sigmoid', returns the decision and the probability of each class: (batch, ...,
        classes).
        """
        logits = self._logits(model, batch)
        kept = {name: batch[name] for name in self.keep}
        if self.loss == 'sigmoid':
            return {'classes': logits > 0, 'probabilities': jax.nn.sigmoid(logits), **kept}
        best = jax.nn.softmax(logits).max(-1)
        return {'class': logits.argmax(-1), 'probability': best, **kept}


def _can_represent(labels: jax.Array, value: int) -> bool:
    """Whether the dtype of integer or boolean labels can represent a value."""
    if labels.dtype == bool:
        return value in (0, 1)
    info = jnp.iinfo(labels.dtype)
    return bool(info.min <= value <= info.max)


def _mask_weights(counts: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Returns the weights where `counts` is true and 0 elsewhere: float32, its shape."""
    given = jnp.ones((), jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    return counts * given.reshape(*given.shape, *[1] * (counts.ndim - given.ndim))


def _one_hot(labels: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim < logits.ndim else labels
