# SPDX-License-Identifier: Apache-2.0
"""The reader and writer of safetensors files, compared with the format's own library."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from trainer.weights import safetensors

library = pytest.importorskip('safetensors')
theirs = pytest.importorskip('safetensors.numpy')

DTYPES = {
    'C64': 'complex64', 'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
    'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2', 'I64': 'int64', 'I32': 'int32',
    'I16': 'int16', 'I8': 'int8', 'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
    'BOOL': 'bool',
}  # fmt: skip
EVERY_DTYPE = pytest.mark.parametrize(('name', 'dtype'), DTYPES.items())


def values(dtype: str) -> dict[str, np.ndarray]:
    """Returns arrays of several dimensions, one scalar and one without elements."""
    numbers = np.arange(24) % 2 if dtype == 'bool' else np.arange(24)
    array = numbers.astype(jnp.dtype(dtype)).reshape(2, 3, 4)
    return {'a/kernel': array, 'scalar': array[1, 2, 3], 'empty': array[:0]}


def same(found: Any, expected: np.ndarray) -> bool:
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and bool((found == expected).all())


def test_every_dtype_is_tested() -> None:
    assert list(DTYPES) == list(safetensors.DTYPES)


@EVERY_DTYPE
def test_the_library_reads_our_files(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    arrays = values(dtype)
    safetensors.write(tmp_path / 'ours.safetensors', arrays)
    found = dict(library.deserialize((tmp_path / 'ours.safetensors').read_bytes()))
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key]['dtype'] == name
        read = np.frombuffer(bytes(found[key]['data']), jnp.dtype(dtype))
        assert same(read.reshape(found[key]['shape']), np.asarray(array))


@EVERY_DTYPE
def test_files_of_the_library_are_read(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    arrays = {key: np.asarray(array) for key, array in values(dtype).items()}
    file = tmp_path / 'theirs.safetensors'
    theirs.save_file(arrays, file, metadata={'made': 'elsewhere'})
    header = file.read_bytes()[8:]
    header = header[: int.from_bytes(file.read_bytes()[:8], 'little')]
    assert json.loads(header)['a/kernel']['dtype'] == name
    found = safetensors.read(file)
    assert found.keys() == arrays.keys()
    assert all(same(found[key], array) for key, array in arrays.items())


def test_a_tensor_is_a_view_of_the_file(tmp_path: pathlib.Path) -> None:
    safetensors.write(tmp_path / 'x.safetensors', {'x': np.ones((4, 4), np.float32)})
    found = safetensors.read(tmp_path / 'x.safetensors')['x']
    assert isinstance(found, np.memmap) and not found.flags.writeable


@pytest.mark.parametrize('dtype', ['bfloat16', 'float8_e4m3fn', 'float8_e5m2'])
def test_the_library_cannot_read_these_dtypes_into_numpy(
    dtype: str, tmp_path: pathlib.Path
) -> None:
    """The reason for our own reader: once this fails, use the library instead."""
    safetensors.write(tmp_path / 'x.safetensors', values(dtype))
    with pytest.raises(KeyError):
        theirs.load((tmp_path / 'x.safetensors').read_bytes())
