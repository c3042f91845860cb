# SPDX-License-Identifier: Apache-2.0
"""A batch as a task sees it: a dict that notes which fields are read, and knows those left out.

What nothing reads is not sent to the devices. Which fields those are shows when shapes are traced,
before anything is compiled: see `recording`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError


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
class Kept:
    """A field of the batch that stays on the host.

    Attributes:
        name: of the field.
        shape: of a global batch, (rows, ...).
        dtype: in which the loader has it.
        held: the dtype in which a device would hold it; None where a task gets a `HostField`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    held: np.dtype[Any] | None


class HostFieldError(UserError):
    """Something was computed with a field that is not on the devices.

    Attributes:
        name: of the field.
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class HostField:
    """What a task gets of a field that stays on the host: it can be passed on, and no more.

    Attributes:
        name: of the field in the batch.
        shape: of a global batch.
        dtype: of its values on the host.
    """

    def __init__(self, kept: Kept):
        self.name, self.shape, self.dtype = kept.name, kept.shape, kept.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values of a global batch."""
        return math.prod(self.shape)

    def error(self, reader: str = '') -> HostFieldError:
        """Returns what is said where something computes with it."""
        reads = f'{reader} reads batch[{self.name!r}], and ' if reader else ''
        return HostFieldError(
            self.name,
            f'{reads}no device can hold what the batch has in {self.name!r} of {self.dtype}. Make '
            "numbers of it in the data's `transforms`, or do not read it: what nothing reads stays "
            'on the host, and `predict` may return it as it is. To leave it out altogether, name '
            "the fields that stay in {'target': 'data.transforms:Keep', 'keys': (...)}",
        )

    def __repr__(self) -> str:
        return f'HostField({self.name!r})'

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        raise self.error()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error()

    __array__ = __getitem__ = __len__ = __iter__ = __contains__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __abs__ = __neg__ = __pos__ = __invert__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __matmul__ = __divmod__ = _refuse
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = __rmatmul__ = _refuse


@contextlib.contextmanager
def naming_host_fields(fields: dict[str, Any]) -> Iterator[None]:
    """Says which field is meant where JAX refuses a `HostField` among these."""
    try:
        yield
    except TypeError as error:
        hidden = [x for x in dict.values(fields) if isinstance(x, HostField)]
        if hidden and HostField.__name__ in str(error):
            raise hidden[0].error() from error
        raise


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
                raise value.error(self._reader)
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
