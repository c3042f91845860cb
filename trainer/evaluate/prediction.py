# SPDX-License-Identifier: Apache-2.0
"""A task's `predict`, split into computed outputs and batch fields that it returns unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.host_rows import gather_rows
from trainer.evaluate.step import EvalStep
from trainer.input.batch import LoadedBatch
from trainer.input.fields import MASK, Fields
from trainer.input.host_field import HostField, HostFieldError
from trainer.modules.shapes import describe
from trainer.parallel.messages import Messages
from trainer.tasks.batch import record_reads
from trainer.tasks.default_prediction import has_predict, shape_message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predictions of a task, split into computed outputs and unchanged fields.

    Fields that devices cannot store, or only in fewer bits, may be returned unchanged: they come
    from the host, in their own dtype. Fields that are used in computations are sent to the devices.

    Attributes:
        step: one batch of the evaluation; its task knows which fields stay on the host.
        fields: those that are sent to the devices.
        unchanged: outputs that are an unchanged field: output name to field name.
        computed: names of the other outputs.
    """

    step: EvalStep
    fields: Fields
    unchanged: Mapping[str, str]
    computed: frozenset[str] = frozenset()

    @classmethod
    def trace(cls, step: EvalStep, fields: Fields, variables: Any) -> Prediction:
        """Traces the task's `predict` to find which fields it computes with.

        Args:
            step: evaluates one batch.
            fields: of the batch; those that a device can store are marked as sent.
            variables: arrays or their shapes.

        Raises:
            UserError: if it computes with a field that devices cannot store.
        """
        # Assume first that all narrowed fields stay on the host; each failed attempt shows some
        # that the task computes with, so these are sent in the next one. The default predictions
        # are computed from what the whole task reads.
        opaque = fields.narrowed if has_predict(step.task.task) else frozenset()
        while True:
            sent = fields.with_sent(fields.sent - opaque)
            trial = cls(step=_keep_on_host(step, sent, opaque), fields=sent, unchanged={})
            # Each attempt needs its own record: reads of an attempt that failed may be of branches
            # that the next one does not take.
            with record_reads() as reads:
                try:
                    computed, unchanged = trial._trace(variables)
                    break
                except HostFieldError as error:
                    # Not a field that sending could help: devices cannot store its dtype.
                    if error.name not in opaque:
                        raise
                    opaque = opaque - {error.name}
                except Exception as error:
                    # Not only HostFieldError: libraries raise all kinds of errors for an object of
                    # an unknown type.
                    if not opaque & reads.names:
                        if text := sorted(reads.names - fields.sent):
                            error.add_note(
                                f'predict can only return {", ".join(text)} of the batch '
                                'unchanged: devices cannot store it'
                            )
                        raise
                    opaque = opaque - reads.names
        # Fields that `predict` does not read need not be sent.
        sent = sent.with_read(reads.names, step.task.transforms)
        return cls(
            step=_keep_on_host(step, sent, opaque),
            fields=sent,
            unchanged=unchanged,
            computed=computed,
        )

    def __call__(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> dict[str, jax.Array]:
        """Returns the computed outputs for a whole batch, and its mask."""
        return self.without_unchanged(self.step.predict(variables, step, index, batch), batch)

    def without_unchanged(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Returns the outputs that are not an unchanged field of the batch."""
        unchanged = self._find_unchanged(outputs, batch)
        return {name: x for name, x in outputs.items() if name not in unchanged}

    def gather_unchanged(self, messages: Messages, batch: LoadedBatch) -> dict[str, np.ndarray]:
        """Brings the outputs that are unchanged fields to the main process, without padding.

        All processes must call it.

        Args:
            messages: those of this pass over the data.
            batch: its host fields are those that this process has read.

        Returns:
            In the main process the outputs by name, of all examples of the global batch; in the
            others, nothing.
        """
        if not self.unchanged:
            return {}
        gathered = gather_rows(messages, {}, batch.host, batch)
        if gathered is None:
            return {}
        return {output: gathered[1][field] for output, field in self.unchanged.items()}

    def _trace(self, variables: Any) -> tuple[frozenset[str], dict[str, str]]:
        unchanged: dict[str, str] = {}

        # A `HostField` is not an array, so `eval_shape` cannot return it: such outputs leave as a
        # side effect of tracing.
        def run(*args: Any) -> Any:
            outputs = self.step.predict(*args)
            unchanged.update(self._find_unchanged(outputs, args[-1]))
            return {name: x for name, x in outputs.items() if name not in unchanged}

        shapes = jax.eval_shape(run, variables, np.int32(0), np.int32(0), self.fields.shapes)
        rows = shapes.pop(MASK).shape
        for name, x in shapes.items():
            if not hasattr(x, 'shape') or x.shape[:1] != rows:
                task = self.step.task.task
                if not has_predict(task):
                    raise UserError(shape_message(task, name, x, rows[0]))
                raise UserError(
                    f"the task's predict returned {name!r} as {describe(x)}; expected an array "
                    f'with one row for each of the {rows[0]} examples of a batch'
                )
        for name, field in unchanged.items():
            if tuple(self.fields.spec[field].shape[:1]) != rows:
                raise UserError(
                    f"the task's predict returned the field {field!r} unchanged as {name!r}, which "
                    f'has not one entry for each of the {rows[0]} examples of a batch'
                )
        return frozenset(shapes), unchanged

    def _find_unchanged(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, str]:
        unchanged = {}
        for name, x in outputs.items():
            if isinstance(x, HostField):
                unchanged[name] = x.name
            for field in self.fields.narrowed & batch.keys():
                if x is batch[field]:  # Used elsewhere too, and returned unchanged.
                    unchanged[name] = field
        return unchanged


def _keep_on_host(step: EvalStep, sent: Fields, opaque: Iterable[str]) -> EvalStep:
    return dataclasses.replace(step, task=step.task.with_host_fields(sent.host_fields(opaque)))
