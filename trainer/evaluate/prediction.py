# SPDX-License-Identifier: Apache-2.0
"""Splits `predict` into what devices compute and the fields that it returns unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from trainer.evaluate.step import EvalStep
from trainer.input.fields import Fields
from trainer.input.host_field import HostField, HostFieldError
from trainer.parallel import processes
from trainer.parallel.mesh import ProcessRows
from trainer.tasks.batch import record_reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predictions of a task, split into what is computed and what is passed on.

    A field that devices cannot store, or only in fewer bits, may be returned unchanged: its rows
    come from the host, in their own dtype. A field that is computed with is sent to the devices.

    Attributes:
        step: one batch of the evaluation; its task knows which fields stay on the host.
        fields: those that are sent to the devices.
        passed: outputs that are an unchanged field: output name to field name.
    """

    step: EvalStep
    fields: Fields
    passed: Mapping[str, str]

    @classmethod
    def of(cls, step: EvalStep, fields: Fields, variables: Any) -> Prediction:
        """Finds out, by tracing, what the task's `predict` does with the fields.

        Args:
            step: one batch of the evaluation.
            fields: with all that a device can store marked as sent.
            variables: arrays or their shapes.

        Raises:
            UserError: if something is computed with a field that devices cannot store.
        """
        opaque = fields.narrowed
        while True:
            sent = fields.with_sent(fields.sent - opaque)
            made = cls(step=_with(step, sent, opaque), fields=sent, passed={})
            with record_reads() as reads:
                try:
                    passed = made._trace(variables)
                    break
                except HostFieldError as error:
                    if error.name not in opaque:
                        raise
                    opaque = opaque - {error.name}
                except Exception as error:
                    # Libraries raise all kinds of errors for an object of an unknown type.
                    if not opaque & reads.names:
                        if text := sorted(reads.names - fields.sent):
                            error.add_note(
                                f'predict can only return {", ".join(text)} of the batch '
                                'unchanged: devices cannot store it'
                            )
                        raise
                    opaque = opaque - reads.names
        sent = sent.with_sent(reads.names)
        return cls(step=_with(step, sent, opaque), fields=sent, passed=passed)

    def __call__(
        self, variables: Mapping[str, Any], step: jax.Array, index: jax.Array, batch: Any
    ) -> dict[str, jax.Array]:
        """Returns what is computed for all rows of a batch, and their mask."""
        outputs = self.step.predict(variables, step, index, batch)
        passed = self._passed(outputs, batch)
        return {name: x for name, x in outputs.items() if name not in passed}

    def whole(
        self, rows: Mapping[str, np.ndarray], held: ProcessRows | None
    ) -> dict[str, np.ndarray]:
        """Returns the outputs that are passed on, for all rows of a global batch.

        All processes must call it.

        Args:
            rows: the fields that are passed on, as this process has read them.
            held: indices of these rows, None for all.
        """
        if held is None or not self.passed:
            return {output: rows[field] for output, field in self.passed.items()}
        mine = (held.held[held.owned], {name: x[held.owned] for name, x in rows.items()})
        parts = processes.gather_objects(mine)
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        whole = {name: np.concatenate([some[name] for _, some in parts])[order] for name in rows}
        return {output: whole[field] for output, field in self.passed.items()}

    def _trace(self, variables: Any) -> dict[str, str]:
        found: dict[str, str] = {}

        def run(*args: Any) -> Any:
            outputs = self.step.predict(*args)
            found.update(self._passed(outputs, args[-1]))
            return {name: x for name, x in outputs.items() if name not in found}

        jax.eval_shape(run, variables, np.int32(0), np.int32(0), self.fields.shapes)
        return found

    def _passed(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        for name, x in outputs.items():
            if isinstance(x, HostField):
                found[name] = x.name
            for field in self.fields.narrowed & batch.keys():
                if x is batch[field]:  # Used elsewhere too, and returned unchanged.
                    found[name] = field
        return found


def _with(step: EvalStep, sent: Fields, opaque: Iterable[str]) -> EvalStep:
    return dataclasses.replace(step, task=step.task.with_host_fields(sent.host_fields(opaque)))
