# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of data: the number of examples and a checksum of the first one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.input.data import Data


def fingerprint(data: Data) -> dict[str, Any]:
    """Returns the number of examples, and dtype, shape and checksum of each field of the first one.

    Processes compare it to detect that they read different data; checkpoints save it as JSON.
    """
    first = {
        # Without the batch dimension, which differs between `first` and a batch.
        name: f'{x.dtype} {x.shape[1:]} {zlib.crc32(_content(x)):08x}'
        for name, x in data.first_example().items()
    }
    return {'examples': data.examples, 'first example': first}


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two fingerprints."""
    changes = []
    old, new = before['examples'], now['examples']
    if old != new:
        counts = ['a stream' if n is None else f'{n:,} examples' for n in (old, new)]
        changes.append(f'{counts[0]} before, {counts[1]} now')
    old_first, new_first = before['first example'], now['first example']
    names = {**old_first, **new_first}
    fields = [name for name in names if old_first.get(name) != new_first.get(name)]
    if fields:
        changes.append(f'the first example differs in {", ".join(fields)}')
    return changes


def _content(x: np.ndarray) -> bytes:
    # The bytes of an object array are addresses, which differ between processes.
    return repr(x.tolist()).encode() if x.dtype.hasobject else x.tobytes()
