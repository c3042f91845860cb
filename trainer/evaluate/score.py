# SPDX-License-Identifier: Apache-2.0
"""Scores: what an evaluation computes on the host, from the predictions for all examples."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from trainer.config.errors import UserError
from trainer.input.fields import MASK

_log = logging.getLogger('trainer')

Examples = Mapping[str, np.ndarray]


class StreamingScore(Protocol):
    """A score that sees one batch at a time, for a split that does not fit in memory.

    It may have a method `discard()`, which is called in place of `close` if there are no values: if
    the evaluation is stopped or fails.
    """

    def __call__(self, examples: Examples) -> None:
        """Takes the predictions and fields of a batch, (rows, ...) each, without padding."""

    def close(self) -> Mapping[str, Any]:
        """Returns the values of the score, after the last batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """`config.evals.<name>.score`, built.

    Attributes:
        make: returns the score of one evaluation: a function of all examples, or a
            `StreamingScore`.
        fields: fields of the batch that it gets in addition to the predictions: by path if they are
            nested ('inputs/x'), or all below a path ('inputs').
        path: config path, for messages.
    """

    make: Callable[[], Any]
    fields: tuple[str, ...]
    path: str


def is_streaming(score: Any) -> bool:
    """Whether a score takes one batch at a time."""
    return callable(getattr(score, 'close', None))


def discard(score: Any) -> None:
    """Ends a score that will not be closed, if it has a method for that."""
    # Not `close`: that computes values, and may write files, from a part of the examples.
    method = getattr(score, 'discard', None)
    if is_streaming(score) and callable(method):
        try:
            method()
        except Exception as error:
            # Not raised: it would hide the error because of which the evaluation has ended.
            _log.warning('A score could not be discarded', exc_info=error)


def check_names(score: Score, computed: Iterable[str], unchanged: Mapping[str, str]) -> None:
    """Checks that no field of a score has the name of another prediction.

    Args:
        score: the score.
        computed: names of the predictions that the task computes.
        unchanged: those that are a field of the batch, unchanged: output to field.

    Raises:
        UserError: naming the field.
    """
    for name in score.fields:
        if name in computed or unchanged.get(name, name) != name:
            raise UserError(
                f"{score.path}.fields: {name!r} is also a name among the outputs of the task's "
                'predict; remove it from fields, or rename the output'
            )


def list_arrays(field: str, names: Iterable[str]) -> list[str]:
    """Returns the arrays of a batch that a field of a score names.

    Args:
        field: the path of an array, or of a node of a nested batch.
        names: paths of the arrays.
    """
    return [name for name in names if name == field or name.startswith(f'{field}/')]


def check_fields(score: Score, spec: Mapping[str, Any], rows: int) -> None:
    """Checks that the batches have the fields that a score asks for.

    Args:
        score: the score.
        spec: shapes of the fields.
        rows: number of examples of a batch.

    Raises:
        UserError: naming the first that they lack, or that does not have one entry for each
            example.
    """
    for name in score.fields:
        names = list_arrays(name, spec)
        if not names:
            raise UserError(
                f'{score.path}.fields: the batches have no field {name!r}; they have '
                f'{", ".join(sorted(spec.keys() - {MASK}))}'
            )
        for array in names:
            if tuple(spec[array].shape[:1]) != (rows,):
                raise UserError(
                    f'{score.path}.fields: {array!r} has the shape {list(spec[array].shape)} in a '
                    f'batch of {rows} examples; a score only gets fields with one entry for each '
                    'example'
                )
