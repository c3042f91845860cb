# SPDX-License-Identifier: Apache-2.0
"""Placeholders for batch fields that stay on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer import compat
from trainer.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class HostFieldSpec:
    """Name, shape and dtypes of a batch field that stays on the host.

    Attributes:
        name: name of the field.
        shape: shape in a global batch, (rows, ...).
        dtype: dtype in the loader.
        device_dtype: dtype in which devices would store it; None if a task gets a `HostField`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device_dtype: np.dtype[Any] | None


class HostFieldError(UserError):
    """Traced code computed with a field that stays on the host.

    Attributes:
        name: name of the field.
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class HostField:
    """Placeholder for a field that stays on the host: code can pass it on, but not compute with it.

    Attributes:
        name: name of the field.
        shape: shape in a global batch.
        dtype: dtype on the host.
    """

    def __init__(self, spec: HostFieldSpec):
        self.name, self.shape, self.dtype = spec.name, spec.shape, spec.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements in a global batch."""
        return math.prod(self.shape)

    def error(self, reader: str = '', others: tuple[str, ...] = ()) -> HostFieldError:
        """Returns the error for code that computes with the field.

        Args:
            reader: description of that code.
            others: names of the fields that devices can store, if known.
        """
        # An operation on the placeholder itself does not know which code runs it.
        reader = reader or 'a transform or the task'
        return HostFieldError(
            self.name,
            f'{reader} reads batch[{self.name!r}] of dtype {self.dtype}, which devices cannot '
            "store. Convert it to numbers in the data's `transforms`, or do not read it: fields "
            'that are not read stay on the host, and `predict` may return them unchanged. To drop '
            'the field: '
            f"{{'target': 'trainer.data.transforms:Keep', 'keys': {others or '(...)'}}}",
        )

    def __repr__(self) -> str:
        return f'HostField({self.name!r})'

    def __hash__(self) -> int:
        # Needed because `__eq__` is overridden, which removes the default.
        return id(self)

    def __getattr__(self, name: str) -> Any:
        # JAX and copy probe for private and special names: those must look absent.
        if name.startswith('_'):
            raise AttributeError(name)
        raise self.error()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error()

    # Special methods are looked up on the class, so `__getattr__` does not see them.
    __array__ = __getitem__ = __len__ = __iter__ = __contains__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __abs__ = __neg__ = __pos__ = __invert__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __matmul__ = __divmod__ = _refuse
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = __rmatmul__ = _refuse


@contextlib.contextmanager
def explain_host_fields(batch: Any) -> Iterator[None]:
    """Raises an error that names the field when JAX rejects a `HostField` in a batch."""
    try:
        yield
    except TypeError as error:
        hidden = [*_find_host_fields(batch)]
        # Only for a rejected `HostField`: any other TypeError is a mistake of its own.
        if hidden and compat.refuses_type(error, HostField):
            raise hidden[0].error() from error
        raise


def _find_host_fields(batch: Any) -> Iterator[HostField]:
    if isinstance(batch, HostField):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        # By `dict.values`, which a `Batch` does not override: its own methods record reads.
        for value in dict.values(batch) if isinstance(batch, dict) else batch:
            yield from _find_host_fields(value)
