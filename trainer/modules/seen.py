# SPDX-License-Identifier: Apache-2.0
"""Records what a task has done before it fails: fields that it read, calls of the model."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from trainer.config.errors import UserError

_MOST = 4
# Of a long list, or of a large dict.
_SHOWN = 8


@dataclasses.dataclass
class Call:
    """One call of a model.

    Attributes:
        name: 'model', or 'model.encode'.
        inputs: what it was called with, in words.
        output: what it has returned, in words; None if it has not.
    """

    name: str
    inputs: str
    output: str | None = None


@dataclasses.dataclass
class TaskRecord:
    """What a task has done.

    Attributes:
        calls: of the model, in order.
        fields: those that it has read, in words by name.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    _passed: set[str] = dataclasses.field(default_factory=set)
    # With the values, so that no other one gets the same id.
    _values: dict[int, tuple[str, Any]] = dataclasses.field(default_factory=dict)

    def clear(self) -> None:
        """Clears the record."""
        self.calls.clear()
        self.fields.clear()
        self._values.clear()
        self._passed.clear()

    def note_field(self, name: str, value: Any) -> None:
        """Notes that a field was read."""
        self.fields[name] = describe(value)
        self._values[id(value)] = name, value

    def note_call(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> Call:
        """Notes a call that begins; its `output` is to be set."""
        for value in jax.tree.leaves((args, dict(kwargs))):
            self._passed.add(self._values.get(id(value), ('', None))[0])
        given = [*map(describe, args), *(f'{key}={describe(x)}' for key, x in kwargs.items())]
        self.calls.append(Call(name, ', '.join(given)))
        return self.calls[-1]

    def sentences(self) -> list[str]:
        """Returns a sentence for each call of the model, and one for other fields."""
        found = []
        for call in self.calls[-_MOST:]:
            end = 'has not returned' if call.output is None else f'has returned {call.output}'
            found.append(f'{call.name}({call.inputs}) {end}')
        # What the model is called with is in its calls already.
        rest = {name: kind for name, kind in self.fields.items() if name not in self._passed}
        if found and rest:
            fields = ', '.join(f'batch[{name!r}]: {kind}' for name, kind in rest.items())
            found.append(f'Of the batch, the task has also read {fields}')
        return found


current: contextvars.ContextVar[TaskRecord | None] = contextvars.ContextVar('seen', default=None)


@contextlib.contextmanager
def record_calls() -> Iterator[TaskRecord]:
    """Records the calls and reads of the last task that starts in the block."""
    seen = TaskRecord()
    token = current.set(seen)
    try:
        yield seen
    finally:
        current.reset(token)


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Adds notes on what the last task has done to an error, unless it is a `UserError`."""
    with record_calls() as seen:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            for sentence in seen.sentences():
                error.add_note(sentence)
            raise


def restart() -> None:
    """Clears the record, because another task starts."""
    if (seen := current.get()) is not None:
        seen.clear()


def note_field(name: str, value: Any) -> None:
    """Records that a task reads a field."""
    if (seen := current.get()) is not None:
        seen.note_field(name, value)


def describe(value: Any) -> str:
    """Returns '(float32[32, 10], {...})': arrays by dtype and shape, the rest by type."""
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return f'{value.dtype}{list(value.shape)}'
    if type(value) in (tuple, list):
        items = ', '.join(map(describe, value[:_SHOWN])) + (', ...' if len(value) > _SHOWN else '')
        return f'({items})' if isinstance(value, tuple) else f'[{items}]'
    if isinstance(value, Mapping):
        some = itertools.islice(value.items(), _SHOWN)
        items = ', '.join(f'{name!r}: {describe(x)}' for name, x in some)
        return '{' + items + (', ...' if len(value) > _SHOWN else '') + '}'
    return repr(value) if value is None or isinstance(value, bool) else type(value).__name__
