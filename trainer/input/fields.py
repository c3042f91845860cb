# SPDX-License-Identifier: Apache-2.0
"""The fields of a loader's batches: which are sent to the devices, in which dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.host_field import Kept

# The loader's mark of real rows in a padded batch: bool, (batch,).
MASK = '_mask'

# Numpy's codes for floating-point numbers of more than 64 bits, real and complex.
_LONG = 'gG'


def device_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Returns the dtype in which devices store values of a dtype, None if they cannot."""
    dtype = np.dtype(dtype)
    is_number = dtype.kind == 'b' or jax.dtypes.issubdtype(dtype, np.number)
    if dtype.kind == 'm' or dtype.char in _LONG or not is_number:
        return None
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a loader's batches, and which of them are sent to the devices.

    Attributes:
        where: config path of the data, for messages.
        spec: shape (batch dimension first) and dtype of each field, as the loader has it.
        sent: names of those that are sent to the devices.
    """

    where: str
    spec: Mapping[str, Any]
    sent: frozenset[str]

    @classmethod
    def of(cls, spec: Mapping[str, Any], where: str) -> Fields:
        """Returns the fields, with all that devices can store marked as sent."""
        held = frozenset(n for n, s in spec.items() if device_dtype(s.dtype) is not None)
        return cls(where, spec, held)

    def only(self, names: Iterable[str]) -> Fields:
        """Returns the fields with only these names, and the mask, marked as sent."""
        return dataclasses.replace(self, sent=self.sent & {*names, MASK})

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
        """Names of those that devices store in fewer bits than the loader, sent or not."""
        held = {name: device_dtype(s.dtype) for name, s in self.spec.items()}
        return frozenset(n for n, to in held.items() if to not in (None, self.spec[n].dtype))

    def kept(self, opaque: Iterable[str] = ()) -> tuple[Kept, ...]:
        """Returns those that stay on the host.

        Args:
            opaque: names of those that a task gets as a `HostField` although devices could store
                their dtype.
        """
        opaque = frozenset(opaque)
        return tuple(
            Kept(n, tuple(s.shape), s.dtype, None if n in opaque else device_dtype(s.dtype))
            for n, s in self.spec.items()
            if n not in self.sent
        )

    def placed(self, arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of a block that are sent, in the dtypes of the devices.

        Args:
            arrays: each (steps, rows, ...).
            ids: int64 (steps, rows), the example in each row.

        Raises:
            UserError: for a value that does not fit, naming its example.
        """
        sent = self.sent | {MASK}
        return {n: self._fitting(n, x, ids) for n, x in arrays.items() if n in sent}

    def _fitting(self, name: str, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        to = device_dtype(x.dtype)
        if to is None or to == x.dtype:
            return x
        if to.kind in 'iu':
            limits = np.iinfo(to)
            if x.size and (x.min() < limits.min or x.max() > limits.max):
                self._refuse(name, x, (x < limits.min) | (x > limits.max), to, ids)
            return x.astype(to)
        with np.errstate(over='ignore'):
            converted = x.astype(to)
        # Values that were infinite before are not errors of the conversion.
        if not np.isfinite(converted).all():
            overflown = ~np.isfinite(converted) & np.isfinite(x)
            if overflown.any():
                self._refuse(name, x, overflown, to, ids)
        return converted

    def _refuse(
        self, name: str, x: np.ndarray, wrong: np.ndarray, to: np.dtype[Any], ids: np.ndarray
    ) -> None:
        places = np.argwhere(wrong)
        # Padding repeats a real row; name that one.
        is_real = ids[tuple(places[:, : ids.ndim].T)] >= 0
        place = tuple(places[is_real.argmax()])
        limits = np.iinfo(to) if to.kind in 'iu' else np.finfo(to)
        how = ' (a 64-bit id or hash to two 32-bit fields)' if to.kind in 'iu' else ''
        raise UserError(
            f'{self.where}: the field {name!r} of example {ids[place[: ids.ndim]]} holds '
            f'{x[place]}, but devices store {x.dtype} as {to} ({limits.min} to {limits.max}). '
            f"Convert it in the data's `transforms`{how}, or do not read it in the task: fields "
            'that are not read stay on the host unchanged'
        )
