# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the safetensors format: a length, a JSON header, and the bytes of the tensors.

See https://huggingface.co/docs/safetensors. Tensors are views of a memory-mapped file: only the
slices in use are read from disk. That is one reason not to use the format's own library; the other
is that its numpy part (as of 0.8.0) does not read bfloat16 and float8. The tests compare each dtype
with that library.
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
# The limit of the format's own library.
_MAX_HEADER_BYTES = 100_000_000
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors by name.

    Raises:
        UserError: if the file cannot be read, is truncated, is not in this format, or has a header
            that does not match its bytes.
    """
    file = epath.Path(path)
    try:
        data = _read_bytes(file)
    except OSError as error:
        raise UserError(f'cannot read {file}: {error.strerror or error}') from error
    try:
        header, start = _parse_header(data)
        tensors = {name: _tensor_view(name, data[start:], entry) for name, entry in header.items()}
        _check_no_overlap(header)
        return tensors
    except (ValueError, OverflowError) as error:
        raise UserError(
            f'{file} is not a safetensors file or is damaged ({data.size:,} bytes): {error}'
        ) from error


def write(path: epath.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name.

    Args:
        path: the file to write.
        tensors: arrays of the dtypes in `DTYPES`.
    """
    header, offset = {}, 0
    # `reshape`: `ascontiguousarray` turns a scalar into an array of one dimension.
    arrays = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in tensors.items()}
    for name, x in arrays.items():
        header[name] = {
            'dtype': _NAMES[x.dtype],
            'shape': list(x.shape),
            'data_offsets': [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # Spaces, so that the tensors begin at a multiple of 8 bytes.
    with epath.Path(path).open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for x in arrays.values():
            file.write(x.tobytes())


def _read_bytes(file: epath.Path) -> np.ndarray:
    if '://' in str(file):  # Remote files cannot be mapped.
        return np.frombuffer(file.read_bytes(), np.uint8)
    if file.stat().length == 0:  # Nor can empty ones.
        return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, mode='r')


def _parse_header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    """Returns the header's entries by name of the tensor, and the offset of the tensors' bytes."""
    length = int.from_bytes(data[:8].tobytes(), 'little')
    if data.size < 8 or length > data.size - 8:
        raise ValueError(f'the length of its header, {length:,} bytes, is more than the file')
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f'its header has {length:,} bytes; the limit is {_MAX_HEADER_BYTES:,}')
    header = json_text.parse(data[8 : 8 + length].tobytes())
    if not isinstance(header, dict):
        raise ValueError(f'its header is {json_text.type_name(header)}, not an object')
    header.pop('__metadata__', None)
    return header, 8 + length


def _tensor_view(name: str, data: np.ndarray, entry: Any) -> np.ndarray:
    """Returns a view of the bytes of a tensor.

    Raises:
        ValueError: if the entry is malformed, or its bytes are not in the file.
    """
    keys = ('dtype', 'shape', 'data_offsets')
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise ValueError(
            f'the header entry of {name!r} is {short_repr(entry, limit=60)}; expected an object '
            f'with {", ".join(keys)}'
        )
    if not isinstance(entry['dtype'], str) or entry['dtype'] not in DTYPES:
        raise ValueError(
            f'the dtype of {name!r} is {short_repr(entry["dtype"], limit=60)}; expected one of '
            f'{", ".join(DTYPES)}'
        )
    dtype, shape, span = np.dtype(DTYPES[entry['dtype']]), entry['shape'], entry['data_offsets']
    if not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
        raise ValueError(
            f'{name!r} has shape {short_repr(shape, limit=60)} and bytes '
            f'{short_repr(span, limit=60)}'
        )
    begin, end = span
    if end > data.size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{name!r}, {dtype} {tuple(shape)}, has bytes {begin} to {end}')
    return data[begin:end].view(dtype).reshape(shape)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(json_text.is_int(x) and x >= 0 for x in values)


def _check_no_overlap(header: Mapping[str, Any]) -> None:
    """Raises a ValueError if two tensors share bytes."""
    spans = sorted((*entry['data_offsets'], name) for name, entry in header.items())
    filled = [span for span in spans if span[1] > span[0]]
    for (_, end, first), (begin, _, second) in itertools.pairwise(filled):
        if begin < end:
            raise ValueError(f'{first!r} and {second!r} share bytes')
