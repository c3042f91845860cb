# SPDX-License-Identifier: Apache-2.0
"""Files of `torch.save` are read without PyTorch, and nothing in them can run."""

from __future__ import annotations

import os
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from trainer.config.errors import UserError
from trainer.weights import restore, torch_pickle

MAGIC = 0x1950A86A20F9469CFC6C
VALUES = np.arange(12, dtype='<f4')


def integers(values: Iterable[int]) -> bytes:
    """Opcodes of a tuple."""
    return b'(' + b''.join(b'J' + v.to_bytes(4, 'little', signed=True) for v in values) + b't'


def text(value: str) -> bytes:
    return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def tensor(
    shape: tuple[int, ...] = (3, 4),
    strides: tuple[int, ...] = (4, 1),
    offset: int = 0,
    kind: str = 'Float',
    end: bytes = b'N',
) -> bytes:
    """Opcodes of a tensor, as PyTorch writes them; `end` is that of the older format."""
    storage = (
        b'(' + text('storage') + f'ctorch\n{kind}Storage\n'.encode() + text('7') + text('cpu')
        + integers([12])[1:-1] + end + b'tQ'
    )  # fmt: skip
    hooks = b'\x89ccollections\nOrderedDict\n)R'
    return (
        b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + integers([offset])[1:-1]
        + integers(shape) + integers(strides) + hooks + b'tR'
    )  # fmt: skip


def state_dict(**entries: bytes) -> bytes:
    """A pickle of an OrderedDict, with the state that PyTorch gives it."""
    items = b''.join(text(name) + value for name, value in entries.items())
    state = b'}' + text('_metadata') + b'}sb'
    return b'\x80\x02ccollections\nOrderedDict\n)R(' + items + b'u' + state + b'.'


def write_older(path: pathlib.Path, tree: bytes, contents: bytes = VALUES.tobytes()) -> epath.Path:
    head = (MAGIC, 1001, {'little_endian': True, 'type_sizes': {}})
    parts = [pickle.dumps(each, protocol=2) for each in head]
    storages = [pickle.dumps(['7'], protocol=2), (12).to_bytes(8, 'little'), contents]
    path.write_bytes(b''.join([*parts, tree, *storages]))
    return epath.Path(path)


def write_zip(path: pathlib.Path, tree: bytes, byteorder: str = 'little') -> epath.Path:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('net/data.pkl', tree)
        archive.writestr('net/byteorder', byteorder)
        archive.writestr('net/data/7', VALUES.tobytes())
    return epath.Path(path)


def test_both_formats(tmp_path: pathlib.Path) -> None:
    """Tensors may share a storage, with an offset and any strides."""
    views = {'whole': {}, 'turned': {'shape': (4, 3), 'strides': (1, 4)},
             'last': {'shape': (2,), 'strides': (1,), 'offset': 10},
             'number': {'shape': (), 'strides': (), 'offset': 5},
             'empty': {'shape': (0, 3), 'strides': (3, 1)}}  # fmt: skip
    older = write_older(
        tmp_path / 'a.pth', state_dict(**{name: tensor(**view) for name, view in views.items()})
    )
    newer = write_zip(
        tmp_path / 'b.pth',
        state_dict(**{name: tensor(**view, end=b'') for name, view in views.items()}),
    )
    whole = VALUES.reshape(3, 4)
    expected = {'whole': whole, 'turned': whole.T, 'last': whole[2, 2:], 'number': whole[1, 1],
                'empty': np.zeros((0, 3), 'f4')}  # fmt: skip
    for file in (older, newer):
        found = torch_pickle.read(file)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, expected[name])


@pytest.mark.parametrize(
    ('kind', 'dtype', 'result'),
    [
        ('Half', 'f2', 'f2'),
        ('BFloat16', ml_dtypes.bfloat16, 'f4'),
        ('Long', 'i8', 'i8'),
        ('Bool', '?', '?'),
    ],
)
def test_dtypes(kind: str, dtype: str, result: str, tmp_path: pathlib.Path) -> None:
    """Those of PyTorch; numpy's functions do not know bfloat16."""
    values = np.arange(12).astype(dtype)
    file = write_older(tmp_path / 'a.pt', state_dict(x=tensor(kind=kind)), values.tobytes())
    found = torch_pickle.read(file)['x']
    assert found.dtype == np.dtype(result)
    np.testing.assert_array_equal(found, values.reshape(3, 4).astype(result))


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ('attacked',)


@pytest.mark.parametrize(
    ('name', 'pickled'),
    [
        (f'{os.mkdir.__module__}.mkdir', pickle.dumps({'x': Attack()}, protocol=2)),
        ('builtins.eval', b'\x80\x02cbuiltins\neval\n' + text('1') + b'\x85R.'),
        ('torch._utils._rebuild_parameter.__globals__',
         b'\x80\x04' + text('torch._utils') + text('_rebuild_parameter.__globals__') + b'\x93.'),
        ('torch.nn.modules.linear.Linear', b'\x80\x02ctorch.nn.modules.linear\nLinear\n)R.'),
    ],
)  # fmt: skip
def test_other_names_are_refused(
    name: str, pickled: bytes, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names them, and nothing has run."""
    monkeypatch.chdir(tmp_path)
    for write in (write_older, write_zip):
        file = write(tmp_path / 'a.pt', pickled)
        with pytest.raises(UserError, match=rf'a\.pt contains {name}, an object other than'):
            torch_pickle.read(file)
    assert not (tmp_path / 'attacked').exists()


# Attributes of a dtype, of a function, and of an object with slots.
STATES = ((3, 'V', None, None, None, 1_000_000, 1, 0), {'x': 1}, (None, {'__defaults__': (1,)}))


@pytest.mark.parametrize('state', STATES, ids=['dtype', 'dict', 'slots'])
@pytest.mark.parametrize(
    'owner',
    [
        b'ctorch\nBFloat16Storage\n',
        b'ctorch._utils\n_rebuild_tensor_v2\n',
        b'ctorch._utils\n_rebuild_parameter\n',
        b'ccollections\nOrderedDict\n',
        b'ctorch\nSize\n',
        tensor(kind='BFloat16').partition(b'\n(')[2].partition(b'Q')[0] + b'Q',
        tensor(),
    ],
    ids=['class', 'function', 'parameter', 'dict', 'size', 'storage', 'tensor'],
)
def test_no_attribute_can_be_set(owner: bytes, state: Any, tmp_path: pathlib.Path) -> None:
    """Neither that of a stand-in nor that of a tensor; the next file is read as before."""
    values = np.arange(12).astype(ml_dtypes.bfloat16)
    pickled = b'\x80\x02' + owner + pickle.dumps(state, protocol=2)[2:-1] + b'b.'
    refusals = r'it sets attributes|no attribute|not a dict|does not support item|immutable type'
    with pytest.raises(UserError, match=refusals):
        torch_pickle.read(write_older(tmp_path / 'a.pt', pickled, values.tobytes()))
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2
    file = write_older(tmp_path / 'b.pt', state_dict(x=tensor(kind='BFloat16')), values.tobytes())
    found = torch_pickle.read(file)['x']
    np.testing.assert_array_equal(found, values.astype('f4').reshape(3, 4))


def test_what_pytorch_reads_besides(tmp_path: pathlib.Path) -> None:
    """The message for objects that are no tensors, but harmless."""
    device = b'\x80\x02ctorch\ndevice\n' + text('cpu') + b'\x85R.'
    with pytest.raises(UserError, match=r'torch\.device, .* PyTorch can read it: pip install'):
        torch_pickle.read(write_older(tmp_path / 'a.pt', device))


def test_what_occurs_many_times_is_read_once(tmp_path: pathlib.Path) -> None:
    """A tensor under two names; and lists in lists, of which there are few in the file."""
    # The tensor is 0 in the memo, and each list has what comes before it twice.
    memo = tensor() + b'q\x000' + b''.join(b'(h%ch%clq%c0' % (i, i, i + 1) for i in range(9))
    entries = text('a') + b'h\x00' + text('b') + b'h\x00' + text('c') + b'h\x09'
    tree = b'\x80\x02' + memo + b'}(' + entries + b'u.'
    found = torch_pickle.read(write_older(tmp_path / 'a.pt', tree))
    assert found['a'] is found['b']
    assert found['c'][0] is found['c'][1]


def test_damaged_files(tmp_path: pathlib.Path) -> None:
    """Cut off, with views beyond their storage, of another byte order, of other tools."""
    whole = write_older(tmp_path / 'a.pt', state_dict(x=tensor()))
    for size in (20, 100, 300):
        (tmp_path / 'cut.pt').write_bytes(whole.read_bytes()[:size])
        with pytest.raises(UserError, match=r'cut\.pt cannot be read .* it is damaged, or of ano'):
            torch_pickle.read(epath.Path(tmp_path / 'cut.pt'))
    for view in (
        {'shape': (3, 5)},
        {'offset': 1},
        {'offset': -1},
        {'strides': (-4, 1)},
        {'shape': (10**9, 10**9), 'strides': (0, 0)},
    ):
        file = write_older(tmp_path / 'a.pt', state_dict(x=tensor(**view)))  # type: ignore[arg-type]
        with pytest.raises(UserError, match='does not fit into its storage'):
            torch_pickle.read(file)
    file = write_zip(tmp_path / 'b.pt', state_dict(x=tensor(end=b'')), byteorder='big')
    with pytest.raises(UserError, match='expected little-endian numbers'):
        torch_pickle.read(file)
    with zipfile.ZipFile(tmp_path / 'c.pt', 'w') as archive:
        archive.writestr('other', b'')
    with pytest.raises(UserError, match=r'c\.pt cannot .* with one file data\.pkl, found 0'):
        torch_pickle.read(epath.Path(tmp_path / 'c.pt'))


def test_without_pytorch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`restore` and `init_from` read them as with it: below 'state_dict', under any name."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    inner = state_dict(**{'fc.weight': tensor()})[2:-1]
    tree = b'\x80\x02}(' + text('epoch') + b'K\x03' + text('state_dict') + inner + b'u.'
    write_older(tmp_path / 'net.ckpt', tree)
    raw = restore.raw(tmp_path / 'net.ckpt')
    np.testing.assert_array_equal(raw['fc']['weight'], VALUES.reshape(3, 4))


def test_the_arrays_are_those_of_pytorch(tmp_path: pathlib.Path) -> None:
    """Of all dtypes, parameters and views of one storage, in both formats."""
    torch = pytest.importorskip('torch')
    shared = torch.arange(24.0).reshape(4, 6)
    tree = {
        'views': {
            'rows': shared[1:3], 'turned': shared.T, 'every': shared[:, ::2], 'one': shared[2, 3],
        },
        'parameter': torch.nn.Parameter(torch.ones(2, 3)),
        'dtypes': {
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int16,
                          torch.int32, torch.int64, torch.uint8, torch.bool)
        },
        'rest': [3, 0.5, 'text', None, {'size': (torch.zeros(2, 0),)}],
    }  # fmt: skip
    for newer in (True, False):
        torch.save(tree, tmp_path / 'a.pt', _use_new_zipfile_serialization=newer)
        found = torch_pickle.read(epath.Path(tmp_path / 'a.pt'))
        for name, x in tree['views'].items():
            np.testing.assert_array_equal(found['views'][name], x.numpy())
        np.testing.assert_array_equal(found['parameter'], np.ones((2, 3), 'f4'))
        for name, x in tree['dtypes'].items():
            np.testing.assert_array_equal(found['dtypes'][name], x.float().numpy(), err_msg=name)
        assert found['rest'][:4] == [3, 0.5, 'text', None]
        assert found['rest'][4]['size'][0].shape == (2, 0)
