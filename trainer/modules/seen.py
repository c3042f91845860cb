# SPDX-License-Identifier: Apache-2.0
"""Records which batch fields a task read and how it called the model, to explain its errors."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from trainer import compat
from trainer.config.errors import UserError

# The most recent calls of the model that a message describes.
_MAX_CALLS = 4
# The first items of a list or dict that a message describes.
_MAX_ITEMS = 8


@dataclasses.dataclass
class Call:
    """One call of a model.

    Attributes:
        name: 'model', or 'model.encode'.
        inputs: description of the arguments.
        output: description of the output; None if the call has not returned.
        result: the output itself, if the record keeps it.
        is_direct: whether it was not made within a transformation, such as `jax.grad`; the result
            cannot be used outside of one.
    """

    name: str
    inputs: str
    output: str | None = None
    result: Any = dataclasses.field(default=None, repr=False)
    is_direct: bool = True

    def end(self, result: Any, *, keep: bool) -> None:
        """Records the output."""
        self.output = describe(result)
        self.result = result if keep else None


@dataclasses.dataclass
class TaskRecord:
    """The calls of the model and the batch fields of a task.

    Attributes:
        calls: the calls of the model, in order.
        fields: descriptions of the batch fields that the task has read, by name.
        keeps_results: whether the calls have their results.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    keeps_results: bool = False
    _trace: Any = None
    _passed: set[str] = dataclasses.field(default_factory=set)
    # By id, with the values: a value that was deleted could share its id with a new one.
    _values: dict[int, tuple[str, Any]] = dataclasses.field(default_factory=dict)

    def clear(self) -> None:
        """Clears the record."""
        self.calls.clear()
        self.fields.clear()
        self._values.clear()
        self._passed.clear()

    def note_field(self, name: str, value: Any) -> None:
        """Records that a field was read."""
        self.fields[name] = describe(value)
        self._values[id(value)] = name, value

    def note_call(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> Call:
        """Records the start of a call and returns it; the caller calls its `end`."""
        for value in jax.tree.leaves((args, dict(kwargs))):
            self._passed.add(self._values.get(id(value), ('', None))[0])
        arguments = [*map(describe, args), *(f'{key}={describe(x)}' for key, x in kwargs.items())]
        is_direct = not self.keeps_results or compat.current_trace() == self._trace
        self.calls.append(Call(name, ', '.join(arguments), is_direct=is_direct))
        return self.calls[-1]

    def sentences(self) -> list[str]:
        """Returns a sentence for each call of the model, and one for all other fields."""
        lines = []
        for call in self.calls[-_MAX_CALLS:]:
            end = 'did not return' if call.output is None else f'returned {call.output}'
            lines.append(f'{call.name}({call.inputs}) {end}')
        # Fields that were passed to the model are in the sentences about its calls.
        rest = {name: kind for name, kind in self.fields.items() if name not in self._passed}
        if lines and rest:
            fields = ', '.join(f'batch[{name!r}]: {kind}' for name, kind in rest.items())
            lines.append(f'The task also read {fields}')
        return lines


current: contextvars.ContextVar[TaskRecord | None] = contextvars.ContextVar('seen', default=None)


@contextlib.contextmanager
def record_calls(*, keep_results: bool = False) -> Iterator[TaskRecord]:
    """Records the calls and reads of the last task that starts in the block.

    Args:
        keep_results: whether the calls have their results, for use in the block.
    """
    trace = compat.current_trace() if keep_results else None
    record = TaskRecord(keeps_results=keep_results, _trace=trace)
    token = current.set(record)
    try:
        yield record
    finally:
        current.reset(token)


@contextlib.contextmanager
def explain_errors(*, keep_results: bool = False) -> Iterator[TaskRecord]:
    """Adds the calls and reads of the last task as notes to an error, except to a `UserError`.

    Args:
        keep_results: as in `record_calls`, whose record the block gets.
    """
    with record_calls(keep_results=keep_results) as record:
        try:
            yield record
        except UserError:  # Its message already says what is wrong.
            raise
        except Exception as error:
            for sentence in record.sentences():
                error.add_note(sentence)
            raise


def restart() -> None:
    """Clears the record when another task starts."""
    if (record := current.get()) is not None:
        record.clear()


def note_field(name: str, value: Any) -> None:
    """Records that a task reads a field."""
    if (record := current.get()) is not None:
        record.note_field(name, value)


def describe(value: Any) -> str:
    """Returns '(float32[32, 10], {...})': arrays by dtype and shape, the rest by type."""
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return f'{value.dtype}{list(value.shape)}'
    if type(value) in (tuple, list):
        rest = ', ...' if len(value) > _MAX_ITEMS else ''
        items = ', '.join(map(describe, value[:_MAX_ITEMS])) + rest
        return f'({items})' if isinstance(value, tuple) else f'[{items}]'
    if isinstance(value, Mapping):
        some = itertools.islice(value.items(), _MAX_ITEMS)
        items = ', '.join(f'{name!r}: {describe(x)}' for name, x in some)
        return '{' + items + (', ...' if len(value) > _MAX_ITEMS else '') + '}'
    return repr(value) if value is None or isinstance(value, bool) else type(value).__name__
