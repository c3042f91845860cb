# SPDX-License-Identifier: Apache-2.0
"""A batch as a task sees it: a dict that notes which fields are read, and knows those left out.

What nothing reads is not sent to the devices. Which fields those are shows when shapes are traced,
before anything is compiled: see `recording`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any

import jax

from trainer.config.errors import UserError
from trainer.step.host_field import HostField


@dataclasses.dataclass
class Reads:
    """What a task was seen to do.

    Attributes:
        names: the fields of the batch that it has read, or that what it has read is made of.
        weighted: whether it has returned weights.
    """

    names: set[str] = dataclasses.field(default_factory=set)
    weighted: bool = False


_reads: contextvars.ContextVar[Reads | None] = contextvars.ContextVar('reads', default=None)


@contextlib.contextmanager
def recording() -> Iterator[Reads]:
    """Yields what tasks that are traced meanwhile are seen to do; what is around notes nothing."""
    reads = Reads()
    token = _reads.set(reads)
    try:
        yield reads
    finally:
        _reads.reset(token)


def is_recording() -> bool:
    """Whether anything asks what is read."""
    return _reads.get() is not None


def note_weights() -> None:
    """Notes that a task has returned weights."""
    if (reads := _reads.get()) is not None:
        reads.weighted = True


@dataclasses.dataclass(frozen=True)
class Unsent:
    """In the place of a field that was not read when the shapes were traced.

    Attributes:
        name: of the field.
    """

    name: str


class Batch(dict[str, Any]):
    """The fields of a batch by name; it says what it holds when its reader asks for another one.

    Every way to a value goes through `__getitem__`, also that of `dict(batch)` and `f(**batch)`,
    which take the shortcut of a plain dict unless `__iter__` is overridden. To JAX it is a pytree,
    and to take it apart is to read all of it.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        reader: str,
        *,
        origins: Mapping[str, frozenset[str]] | None = None,
        passing: bool = False,
    ):
        """Takes the fields.

        Args:
            fields: arrays, `HostField` and `Unsent`, by name.
            reader: who reads them, for messages.
            origins: which fields of the loader's batch each one is made of; what has none is not
                noted as read.
            passing: hand out a `HostField` to be passed on; to read one is an error otherwise.
        """
        super().__init__(fields)
        self._reader = reader
        self._origins = origins or {}
        self._passing = passing

    def __missing__(self, name: str) -> Any:
        held = {key: x for key, x in dict.items(self) if hasattr(x, 'dtype')}
        fields = ', '.join(f'{key}: {x.dtype}{list(x.shape)}' for key, x in held.items())
        raise UserError(
            f'{self._reader} asks for batch[{name!r}], and a batch holds {fields}.\n'
            'Name the field in its arguments, or rename it with a transform '
            '(data.transforms:Rename).'
        )

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Unsent):
            raise UserError(
                f'{self._reader} reads batch[{value.name!r}] now, and did not when its shapes were '
                'traced at the start, so the field is not on the devices. Which fields are read '
                'must not change from one call to the next'
            )
        names = self._origins.get(name, frozenset())
        if isinstance(value, HostField):
            if not self._passing:
                rest = [n for n, x in dict.items(self) if not isinstance(x, HostField)]
                raise value.error(self._reader, tuple(rest))
            names = frozenset({value.name})
        if (reads := _reads.get()) is not None:
            reads.names |= names
        return value

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the field, or the default if the batch has none of that name."""
        if name not in self:
            return default
        return self[name]

    def items(self) -> Any:
        """Returns names and values."""
        return ItemsView(self)

    def values(self) -> Any:
        """Returns the values."""
        return ValuesView(self)

    def copy(self) -> dict[str, Any]:
        """Returns a plain dict of all fields."""
        return dict(self)

    def pop(self, name: str, *default: Any) -> Any:
        """Removes a field and returns it."""
        if name in self:
            value = self[name]
            del self[name]
            return value
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        """Removes the last field and returns it with its name."""
        name = next(reversed(self), '')
        return name, self.pop(name)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Returns the field, put there if the batch has none of that name."""
        if name not in self:
            self[name] = default
        return self[name]

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


def _flatten(batch: Batch) -> tuple[list[tuple[Any, Any]], tuple[tuple[str, ...], str]]:
    names = tuple(sorted(batch))
    return [(jax.tree_util.DictKey(name), batch[name]) for name in names], (names, batch._reader)


def _unflatten(about: tuple[tuple[str, ...], str], values: Any) -> Batch:
    names, reader = about
    return Batch(dict(zip(names, values, strict=True)), reader)


jax.tree_util.register_pytree_with_keys(Batch, _flatten, _unflatten)


def plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a batch is on the devices, as a plain dict; nothing counts as read."""
    fields = dict.items(batch) if isinstance(batch, dict) else batch.items()
    return {name: x for name, x in fields if not isinstance(x, (HostField, Unsent))}
