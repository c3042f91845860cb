# SPDX-License-Identifier: Apache-2.0
"""The safetensors format: a length, a JSON header, and the bytes of the tensors.

See https://huggingface.co/docs/safetensors. Read as views of the mapped file: a tensor that nobody
slices stays on the disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from trainer.config.errors import UserError

_DTYPES: dict[str, Any] = {
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
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors by name.

    Raises:
        UserError: if it is no such file, or one that was cut short.
    """
    file = epath.Path(path)
    data = _bytes(file)
    length = int.from_bytes(data[:8].tobytes(), 'little')
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop('__metadata__', None)
        return {name: _tensor(data[8 + length :], entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{file} is no safetensors file, or was cut short ({data.size:,} bytes): {error}'
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


def _tensor(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry['data_offsets']
    dtype, shape = np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape'])
    if end > data.size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'a tensor of shape {shape} lies at the bytes {begin} to {end}')
    return data[begin:end].view(dtype).reshape(shape)
