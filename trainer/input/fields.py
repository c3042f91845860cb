# SPDX-License-Identifier: Apache-2.0
"""The fields of a batch: which ones are sent to the devices, and in which dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.host_field import HostFieldSpec

# Name of the loader's mask: bool (batch,), False for rows of padding.
MASK = '_mask'

# dtype codes of numpy's long double (more than 64 bits), real and complex.
_LONG = 'gG'


def device_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Returns the dtype in which devices store values of a dtype, or None if they cannot."""
    dtype = np.dtype(dtype)
    is_number = dtype.kind == 'b' or jax.dtypes.issubdtype(dtype, np.number)
    # numpy counts durations (kind m) as signed integers, and long doubles as numbers.
    if dtype.kind == 'm' or dtype.char in _LONG or not is_number:
        return None
    # 64 bits become 32, unless JAX is configured for 64.
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a loader's batches, and which of them are sent to the devices.

    Attributes:
        where: config path of the data, for messages.
        spec: shape (batch dimension first) and dtype of each field in the loader.
        sent: names of the fields that are sent to the devices.
        num_shapes: how many shapes whole batches may have; None for batches of rows.
    """

    where: str
    spec: Mapping[str, Any]
    sent: frozenset[str]
    num_shapes: int | None = None

    @classmethod
    def from_spec(
        cls, spec: Mapping[str, Any], where: str, *, num_shapes: int | None = None
    ) -> Fields:
        """Returns the fields of a loader; all that devices can store are sent."""
        sent = frozenset(n for n, s in spec.items() if device_dtype(s.dtype) is not None)
        return cls(where, spec, sent, num_shapes)

    def with_sent(self, names: Iterable[str]) -> Fields:
        """Returns the fields with only these, and the mask, sent to the devices."""
        return dataclasses.replace(self, sent=self.sent & {*names, MASK})

    def with_read(self, names: Iterable[str], transforms: Sequence[Any]) -> Fields:
        """Returns the fields with only those sent that a task reads.

        Args:
            names: the fields that it reads, directly or through device transforms.
            transforms: the device transforms.
        """
        # Transforms see zeros in place of fields that are not sent, with as many rows as the others
        # have. Arrays of whole batches may have any number.
        if transforms and self.num_shapes is not None:
            return self
        return self.with_sent(names)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype on the devices of each field that is sent."""
        return {
            name: jax.ShapeDtypeStruct(s.shape, device_dtype(s.dtype))
            for name, s in self.spec.items()
            if name in self.sent
        }

    @property
    def narrowed(self) -> frozenset[str]:
        """Names of the fields that devices store in fewer bits than the loader, sent or not."""
        dtypes = {name: device_dtype(s.dtype) for name, s in self.spec.items()}
        return frozenset(n for n, to in dtypes.items() if to not in (None, self.spec[n].dtype))

    def host_fields(self, opaque: Iterable[str] = ()) -> tuple[HostFieldSpec, ...]:
        """Returns the fields that stay on the host.

        Args:
            opaque: names of fields that a task gets as a `HostField` although devices could store
                their dtype.
        """
        opaque = frozenset(opaque)
        return tuple(
            HostFieldSpec(
                n, tuple(s.shape), s.dtype, None if n in opaque else device_dtype(s.dtype)
            )
            for n, s in self.spec.items()
            if n not in self.sent
        )

    def to_device_dtypes(
        self, arrays: Mapping[str, np.ndarray], ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the fields of a block that are sent, in the dtypes of the devices.

        Args:
            arrays: each (steps, rows, ...).
            ids: int64 (steps, rows), the example in each row.

        Raises:
            UserError: if a value is out of range of the device dtype, naming its example.
        """
        sent = self.sent | {MASK}
        return {n: self._convert(n, x, ids) for n, x in arrays.items() if n in sent}

    def _convert(self, name: str, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        to = device_dtype(x.dtype)
        if to is None or to == x.dtype:
            return x
        if to.kind in 'iu':
            limits = np.iinfo(to)
            # Reductions first: they need no temporary array, and almost every batch passes.
            if x.size and (x.min() < limits.min or x.max() > limits.max):
                self._refuse(name, x, (x < limits.min) | (x > limits.max), to, ids)
            return x.astype(to)
        # The overflow is an error below, with more detail than numpy's warning.
        with np.errstate(over='ignore'):
            converted = x.astype(to)
        # Infinity in the loader's array is not an overflow of the conversion.
        if not np.isfinite(converted).all():
            overflowed = ~np.isfinite(converted) & np.isfinite(x)
            if overflowed.any():
                self._refuse(name, x, overflowed, to, ids)
        return converted

    def _refuse(
        self, name: str, x: np.ndarray, wrong: np.ndarray, to: np.dtype[Any], ids: np.ndarray
    ) -> None:
        indices = np.argwhere(wrong)
        index, whose = tuple(indices[0]), 'a batch'
        if x.shape[: ids.ndim] == ids.shape:
            # Padding repeats a real example: name that one.
            is_real = ids[tuple(indices[:, : ids.ndim].T)] >= 0
            index = tuple(indices[is_real.argmax()])
            whose = f'example {ids[index[: ids.ndim]]}'
        limits = np.iinfo(to) if to.kind in 'iu' else np.finfo(to)
        hint = ' (a 64-bit id or hash to two 32-bit fields)' if to.kind in 'iu' else ''
        raise UserError(
            f'{self.where}: the field {name!r} of {whose} has the value {x[index]}, but devices '
            f'store {x.dtype} as {to} ({limits.min} to {limits.max}). '
            f"Convert it in the data's `transforms`{hint}, or do not read it in the task: fields "
            'that are not read stay on the host unchanged'
        )
