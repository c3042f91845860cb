# SPDX-License-Identifier: Apache-2.0
"""The batch of a task: a dict that records which fields are read.

Fields that are never read are not sent to the devices. The reads are recorded while the shapes are
traced, before anything is compiled: see `record_reads`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any

import jax

from trainer.config.errors import UserError
from trainer.input.host_field import HostField
from trainer.input.structure import Structure
from trainer.modules import seen


@dataclasses.dataclass
class Reads:
    """A record of the fields that a task reads, and of whether it returns weights.

    Attributes:
        names: the fields of the batch that it has read, directly or through device transforms.
        weighted: whether it has returned weights.
    """

    names: set[str] = dataclasses.field(default_factory=set)
    weighted: bool = False


# The record of the innermost `record_reads`, or None outside of one. A context variable, so that
# threads that trace at the same time do not share a record.
reads: contextvars.ContextVar[Reads | None] = contextvars.ContextVar('reads', default=None)


@contextlib.contextmanager
def record_reads() -> Iterator[Reads]:
    """Records the reads of tasks that are traced in the block, but not in an outer record."""
    record = Reads()
    token = reads.set(record)
    try:
        yield record
    finally:
        reads.reset(token)


def note_reads(names: Iterable[str]) -> None:
    """Records that fields are read."""
    if (record := reads.get()) is not None:
        record.names |= {*names}


def note_weights() -> None:
    """Records that a task has returned weights."""
    if (record := reads.get()) is not None:
        record.weighted = True


@dataclasses.dataclass(frozen=True)
class UnsentField:
    """Placeholder for a field that was not sent, because it was not read in the first trace.

    Attributes:
        name: name of the field.
    """

    name: str


def join_path(path: str, key: Any) -> str:
    """Returns the path of an item below a path; that of the batch is ''."""
    return f'{path}/{key}' if path else str(key)


def _select(node: Any, path: str) -> Any:
    """Returns what is at a path below a node of a batch."""
    # A transform may have put a plain dict there.
    if isinstance(node, PlainBatch) or (isinstance(node, Mapping) and path in node):
        return node[path]
    key, _, rest = path.partition('/')
    value = _child(node, key)
    return _select(value, rest) if rest else value


def _child(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return node[key]
    return getattr(node, key) if hasattr(node, key) else node[int(key)]


def with_field(batch: Any, path: str, value: Any) -> Any:
    """Returns a batch with another value at a path, such as 'image' or 'inputs/image'.

    Args:
        batch: a dict of arrays, or a nested one; in it, also a tuple or a list.
        path: of a field that it has, or a new name.
        value: the array.
    """
    key, _, rest = path.partition('/')
    if isinstance(batch, Mapping):
        if not rest or path in batch or key not in batch:
            return {**batch, path: value}
        return {**batch, key: with_field(batch[key], rest, value)}
    new = with_field(_child(batch, key), rest, value) if rest else value
    if hasattr(batch, '_replace'):  # A NamedTuple.
        return batch._replace(**{key: new})
    return type(batch)(new if i == int(key) else x for i, x in enumerate(batch))


def _list_fields(batch: dict[str, Any]) -> str:
    """Returns the fields that are on the devices, with dtype and shape, without reading them."""
    return ', '.join(
        f'{key}: {f"{{{_list_fields(x)}}}" if isinstance(x, dict) else seen.describe(x)}'
        for key, x in dict.items(batch)
        if not isinstance(x, UnsentField)
    )


class MissingFieldError(UserError):
    """A task reads a field that its batch does not have."""


class PlainBatch(dict[str, Any]):
    """The fields of a batch by name; the error for a missing field lists the existing ones.

    It is a JAX pytree like any dict.
    """

    _reader = 'the task'
    # Path of the dict in the batch, '' for the batch itself.
    _path = ''

    def __missing__(self, name: str) -> Any:
        # A path, such as 'inputs/x': tasks take the name of a field as an argument.
        first, _, rest = name.partition('/') if isinstance(name, str) else (name, '', '')
        if rest and first in self:
            with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
                return _select(self[first], rest)
        raise MissingFieldError(
            f'{self._reader} asks for batch[{join_path(self._path, name)!r}], and '
            f'{f"batch[{self._path!r}]" if self._path else "a batch"} holds {_list_fields(self)}.\n'
            'Name the field in its arguments, or rename it with a transform '
            '(trainer.data.transforms:Rename).'
        )


class Batch(PlainBatch):
    """A batch that records which fields are read, and raises an error for fields without arrays.

    Every access to a value goes through `__getitem__`, including `dict(batch)` and `f(**batch)`,
    which bypass it unless `__iter__` is overridden. It is a JAX pytree; flattening it reads all
    fields.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        reader: str,
        *,
        origins: Mapping[str, frozenset[str]] | None = None,
        passing: bool = False,
        path: str = '',
    ):
        """Wraps the fields.

        Args:
            fields: arrays, `HostField` and `UnsentField`, by name; in a nested batch also batches
                for the dicts in it, and other trees.
            reader: description of the code that reads them, for messages.
            origins: the fields of the loader's batch that each one is computed from; reads of
                fields without an entry are not recorded.
            passing: whether reading a `HostField` returns it, so that it can be returned unchanged;
                otherwise reading it is an error.
            path: path of this dict in a nested batch.
        """
        super().__init__(fields)
        self._path = path
        self._reader = reader
        self._origins = origins or {}
        self._passing = passing

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Batch):
            return value  # It records its own reads.
        _check_sent(value, self._reader)
        names = self._origins.get(name, frozenset())
        if isinstance(value, HostField):
            if not self._passing:
                rest = [n for n, x in dict.items(self) if not isinstance(x, HostField)]
                raise value.error(self._reader, tuple(rest))
            # A transform may have renamed it, so its own name counts.
            names = frozenset({value.name})
        note_reads(names)
        seen.note_field(join_path(self._path, name), value)
        return value

    # CPython copies dict subclasses without `__getitem__`, unless they override `__iter__`.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the field, or the default if there is no such field."""
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
        """Returns the field; adds it first if there is no such field."""
        if name not in self:
            self[name] = default
        return self[name]

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)


def _check_sent(value: Any, reader: str) -> None:
    """Raises an error if a field, or one of a tree of them, was not sent to the devices."""
    if isinstance(value, UnsentField):
        leaves = [value]
    elif isinstance(value, HostField | jax.Array):
        return
    else:
        leaves = [x for x in jax.tree.leaves(value) if isinstance(x, UnsentField)]
    if leaves:
        raise UserError(
            f'{reader} reads batch[{leaves[0].name!r}], but did not when it was first '
            'traced, so the field is not on the devices. Read the same fields in every call'
        )


def view_batch(
    structure: Structure | None,
    fields: Mapping[str, Any],
    reader: str,
    *,
    origins: Mapping[str, frozenset[str]] | None = None,
    passing: bool = False,
) -> Any:
    """Returns a batch as code of the user sees it: a `Batch`, in which the dicts are batches too.

    Reading a tuple, or another tree that is no dict, reads all that is in it.

    Args:
        structure: tree structure of the batch; None for a dict of arrays.
        fields: the arrays by name; other arguments as for `Batch`.
        reader: description of the code that reads them.
        origins: fields that each one is computed from.
        passing: whether reading a `HostField` returns it.
    """
    if structure is None:
        return Batch(fields, reader, origins=origins, passing=passing)
    nothing: frozenset[str] = frozenset()

    def find_origins(node: Any) -> frozenset[str]:
        return nothing.union(*((origins or {}).get(n, nothing) for n in jax.tree.leaves(node)))

    def build(node: Any, path: str) -> Any:
        if type(node) is not dict:
            return jax.tree.map(lambda name: fields[name], node)
        items = {key: build(value, join_path(path, key)) for key, value in node.items()}
        mine = {key: find_origins(value) for key, value in node.items()}
        return Batch(items, reader, origins=mine, passing=passing, path=path)

    batch = build(structure.template, '')
    if not isinstance(batch, Batch):
        _check_sent(batch, reader)
        note_reads(find_origins(structure.template))
    return batch


def as_plain(batch: Any) -> Any:
    """Returns a batch in plain dicts, without the fields that were not sent; records no reads."""

    def convert(node: Any) -> Any:
        if not isinstance(node, PlainBatch):
            return node
        items = dict.items(node)
        return {key: as_plain(x) for key, x in items if not isinstance(x, UnsentField)}

    return jax.tree.map(convert, batch, is_leaf=lambda x: isinstance(x, PlainBatch))


# JAX flattens only the exact type `dict` by itself: each subclass has to be registered.
def _flatten_plain(batch: PlainBatch) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(batch))
    return [(jax.tree_util.DictKey(name), batch[name]) for name in names], names


jax.tree_util.register_pytree_with_keys(
    PlainBatch,
    _flatten_plain,
    lambda names, values: PlainBatch(zip(names, values, strict=True)),
)


def _flatten(batch: Batch) -> tuple[list[tuple[Any, Any]], tuple[tuple[str, ...], str]]:
    names = tuple(sorted(batch))
    return [(jax.tree_util.DictKey(name), batch[name]) for name in names], (names, batch._reader)


def _unflatten(static: tuple[tuple[str, ...], str], values: Any) -> Batch:
    # Without origins: flattening has recorded the reads already.
    names, reader = static
    return Batch(dict(zip(names, values, strict=True)), reader)


jax.tree_util.register_pytree_with_keys(Batch, _flatten, _unflatten)


def device_fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the device fields of a batch as a plain dict, without recording reads."""
    fields = dict.items(batch) if isinstance(batch, dict) else batch.items()
    return {name: x for name, x in fields if not isinstance(x, (HostField, UnsentField))}


def flatten_batch(batch: Any) -> dict[str, Any]:
    """Returns the device fields of a batch, nested or not, by name, without recording reads."""
    plain = as_plain(batch)
    structure = Structure.from_tree(plain, 'the batch')
    return device_fields(plain if structure is None else structure.flatten(plain, 'the batch'))
