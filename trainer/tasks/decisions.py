# SPDX-License-Identifier: Apache-2.0
"""Reads the scores, labels and weights of a batch for the metrics of classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from trainer.config.errors import UserError
from trainer.modules.shapes import describe
from trainer.tasks.metrics import broadcast_weights

Kind = Literal['binary', 'multiclass', 'multilabel']

_FITTING = (
    'expected scores [batch, classes] with integer labels [batch], or scores and labels of one '
    'shape: [batch] or [batch, 1] for one decision per example, [batch, labels] for several'
)


class Reader(Protocol):
    """A metric class with the names of the outputs that it reads."""

    scores: ClassVar[str]
    labels: ClassVar[str]
    weights: ClassVar[str]
    __name__: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """The outputs that a classification metric reads.

    Attributes:
        kind: 'multiclass' for one of several classes, 'binary' for one decision, 'multilabel' for
            several decisions.
        scores: (batch, ..., classes) if multiclass, otherwise the shape of the labels.
        labels: (batch, ...), with a last dimension for the labels if multilabel. A negative label
            does not count.
        weights: float32, the leading dimensions of the labels.
    """

    kind: Kind
    scores: jax.Array
    labels: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Labels, and the decisions of a model.

    Attributes:
        labels: int32 (examples,), or (examples, labels) if an example has several decisions.
        guesses: the decisions, in the shape of the labels.
        weights: float32 in the shape of the labels, 0 for labels that do not count.
        classes: number of classes of each decision; 2 for a binary one.
    """

    labels: jax.Array
    guesses: jax.Array
    weights: jax.Array
    classes: int


def read_output(metric: str, name: str, outputs: Mapping[str, Any]) -> jax.Array:
    """Returns an output of a task.

    Raises:
        UserError: if the task does not return it, or it is not an array.
    """
    value = outputs.get(name)
    if not hasattr(value, 'dtype'):
        raise UserError(
            f'the metric {metric} reads {name!r}, which the task does not return; it returns '
            f'{", ".join(sorted(key for key, x in outputs.items() if hasattr(x, "dtype")))}. Name '
            f'another one in the arguments of {metric}, or return it'
        )
    return jnp.asarray(value)


def read_weights(metric: str, name: str, outputs: Mapping[str, Any], like: Any) -> jax.Array:
    """Returns the weights of a batch, float32, (batch, ...).

    Args:
        metric: name of the metric, for messages.
        name: name of the output; without it, all examples are weighted equally.
        outputs: the outputs of the task, by name.
        like: the array whose leading dimensions the weights must have.

    Raises:
        UserError: if the weights have other dimensions.
    """
    if outputs.get(name) is None:
        return jnp.ones(like.shape[:1], jnp.float32)
    weights = jnp.asarray(outputs[name])
    if weights.shape != like.shape[: weights.ndim]:
        raise UserError(
            f'the metric {metric}: {name!r} is {describe(weights)}, which does not fit labels of '
            f'{describe(like)}; expected one weight for each example or each label'
        )
    return weights.astype(jnp.float32)


def read_scored(metric: type[Reader], outputs: Mapping[str, Any]) -> Scored:
    """Returns scores, labels and weights of a batch.

    Raises:
        UserError: if one is missing, or their shapes do not fit.
    """
    scores = read_output(metric.__name__, metric.scores, outputs)
    labels = read_output(metric.__name__, metric.labels, outputs)
    kind = _find_kind(scores, labels)
    if kind is None:
        raise UserError(
            f'the metric {metric.__name__}: {metric.scores!r} is {describe(scores)} and '
            f'{metric.labels!r} is {describe(labels)}; {_FITTING}'
        )
    weights = read_weights(metric.__name__, metric.weights, outputs, labels)
    return Scored(
        kind, scores if kind != 'binary' else scores.reshape(labels.shape), labels, weights
    )


def _find_kind(scores: jax.Array, labels: jax.Array) -> Kind | None:
    """Returns the kind of classification that the shapes imply, None if they do not fit."""
    if scores.shape == labels.shape and labels.ndim:
        return 'multilabel' if labels.ndim > 1 and labels.shape[-1] > 1 else 'binary'
    if scores.shape[:-1] != labels.shape or not labels.ndim:
        return None
    if scores.shape[-1] == 1:
        return 'binary'
    # Class indices are integers.
    return None if jnp.issubdtype(labels.dtype, jnp.inexact) else 'multiclass'


def decide(
    metric: type[Reader], outputs: Mapping[str, Any], *, threshold: float, classes: int | None
) -> Decisions:
    """Returns labels and decisions of a batch.

    Args:
        metric: the metric, which names the outputs.
        outputs: the outputs of the task, by name.
        threshold: a score above it is a positive decision.
        classes: number of classes, if the scores are the decisions themselves: integers.

    Raises:
        UserError: if an output is missing, or its shape does not fit.
    """
    given = read_output(metric.__name__, metric.scores, outputs)
    if jnp.issubdtype(given.dtype, jnp.integer):
        return _read_decided(metric, given, outputs, classes)
    found = read_scored(metric, outputs)
    weights = broadcast_weights(found.weights, found.labels.shape)
    # A comparison with NaN is false, so a label that is NaN does not count either.
    weights = jnp.where(found.labels >= 0, weights, 0.0)
    if found.kind == 'multiclass':
        _check_classes(metric, classes, found.scores.shape[-1])
        guesses, labels = found.scores.argmax(-1), found.labels
        many = found.scores.shape[-1]
    else:
        _check_classes(metric, classes, 2)
        guesses, labels, many = found.scores > threshold, found.labels > 0.5, 2
    shape = (-1, found.labels.shape[-1]) if found.kind == 'multilabel' else (-1,)
    labels, guesses = (x.astype(jnp.int32).reshape(shape) for x in (labels, guesses))
    return Decisions(labels, guesses, weights.reshape(shape), many)


def _read_decided(
    metric: type[Reader], guesses: jax.Array, outputs: Mapping[str, Any], classes: int | None
) -> Decisions:
    """Returns the decisions that a task returns as integers."""
    labels = read_output(metric.__name__, metric.labels, outputs)
    if classes is None or guesses.shape != labels.shape:
        raise UserError(
            f'the metric {metric.__name__}: {metric.scores!r} is {describe(guesses)}, integers, '
            f'and {metric.labels!r} is {describe(labels)}; predicted classes need the shape of the '
            'labels, and their number: classes=10 for example. Use booleans for binary decisions'
        )
    weights = read_weights(metric.__name__, metric.weights, outputs, labels)
    weights = jnp.where(labels >= 0, broadcast_weights(weights, labels.shape), 0.0)
    labels, guesses = (x.astype(jnp.int32).ravel() for x in (labels, guesses))
    return Decisions(labels, guesses, weights.ravel(), classes)


def _check_classes(metric: type[Reader], given: int | None, found: int) -> None:
    if given not in (None, found):
        raise UserError(
            f'the metric {metric.__name__}: classes={given}, but {metric.scores!r} has scores for '
            f'{found}. Leave classes out: it is for integer predictions'
        )
