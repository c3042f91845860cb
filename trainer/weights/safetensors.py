# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: a length, a JSON header, and the bytes of the tensors.

See https://huggingface.co/docs/safetensors. A tensor is a view of the mapped file: what nobody
slices stays on the disk. That is one reason for not using the format's own library; the other is
that its numpy part (as of 0.8.0) does not read bfloat16 and float8. Each dtype is tested beside it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from trainer.config import json_text
from trainer.config.errors import UserError, short_repr

DTYPES: dict[str, Any] = {
    'C64': np.complex64,
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': jnp.bfloat16,
    'F8_E4M3': jnp.float8_e4m3fn,
    'F8_E5M2': jnp.float8_e5m2,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U64': np.uint64,
    'U32': np.uint32,
    'U16': np.uint16,
    'U8': np.uint8,
    'BOOL': np.bool_,
}
# As in the format's own library.
_MOST_HEADER = 100_000_000
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors by name.

    Raises:
        UserError: if it is no such file, one that was cut short, or one whose header names no
            tensors that are there.
    """
    file = epath.Path(path)
    try:
        data = _bytes(file)
    except OSError as error:
        raise UserError(f'{file} cannot be read: {error.strerror or error}') from error
    try:
        header, start = _header(data)
        tensors = {name: _tensor(name, data[start:], entry) for name, entry in header.items()}
        _check_apart(header)
        return tensors
    except (ValueError, OverflowError) as error:
        raise UserError(
            f'{file} is no safetensors file, or is damaged ({data.size:,} bytes): {error}'
        ) from error


def write(path: epath.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name, so that `read` and every other reader of the format gets them."""
    header, offset = {}, 0
    arrays = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in tensors.items()}
    for name, x in arrays.items():
        header[name] = {
            'dtype': _NAMES[x.dtype],
            'shape': list(x.shape),
            'data_offsets': [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # The tensors are aligned.
    with epath.Path(path).open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for x in arrays.values():
            file.write(x.tobytes())


def _bytes(file: epath.Path) -> np.ndarray:
    if '://' in str(file):
        return np.frombuffer(file.read_bytes(), np.uint8)
    if file.stat().length == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, mode='r')


def _header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    """Returns the entries of the tensors by name, and the place where their bytes begin."""
    length = int.from_bytes(data[:8].tobytes(), 'little')
    if data.size < 8 or length > data.size - 8:
        raise ValueError(f'its header has {length:,} bytes, more than the file')
    if length > _MOST_HEADER:
        raise ValueError(f'its header has {length:,} bytes; the format allows {_MOST_HEADER:,}')
    header = json_text.parse(data[8 : 8 + length].tobytes())
    if not isinstance(header, dict):
        raise ValueError(f'its header is {json_text.type_name(header)}, not an object')
    header.pop('__metadata__', None)
    return header, 8 + length


def _tensor(name: str, data: np.ndarray, entry: Any) -> np.ndarray:
    """Returns a view of the bytes of a tensor.

    Raises:
        ValueError: if the entry is none, or its bytes are not in the file.
    """
    keys = ('dtype', 'shape', 'data_offsets')
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise ValueError(
            f'{name!r} of its header is {short_repr(entry, limit=60)}; expected {", ".join(keys)}'
        )
    if not isinstance(entry['dtype'], str) or entry['dtype'] not in DTYPES:
        raise ValueError(
            f'{name!r} has the dtype {short_repr(entry["dtype"], limit=60)}; known are '
            f'{", ".join(DTYPES)}'
        )
    dtype, shape, place = np.dtype(DTYPES[entry['dtype']]), entry['shape'], entry['data_offsets']
    if not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise ValueError(
            f'{name!r} has the shape {short_repr(shape, limit=60)} at the bytes '
            f'{short_repr(place, limit=60)}'
        )
    begin, end = place
    if end > data.size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{name!r}, {dtype} {tuple(shape)}, is at the bytes {begin} to {end}')
    return data[begin:end].view(dtype).reshape(shape)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(json_text.is_int(x) and x >= 0 for x in values)


def _check_apart(header: Mapping[str, Any]) -> None:
    """Raises a ValueError if two tensors share bytes."""
    places = sorted((*entry['data_offsets'], name) for name, entry in header.items())
    filled = [place for place in places if place[1] > place[0]]
    for (_, end, first), (begin, _, second) in itertools.pairwise(filled):
        if begin < end:
            raise ValueError(f'{first!r} and {second!r} share bytes')
