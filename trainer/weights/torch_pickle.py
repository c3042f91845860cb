# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors in files of `torch.save` without PyTorch, and without running code in them.

Such a file is a pickle, which can name any function of any module and call it. Here it can name the
few that build tensors, and gets harmless stand-ins for them; every other name is an error.

Both formats are read: a zip archive, and the one before PyTorch 1.6, which is a sequence of
pickles followed by the contents of the storages. A tensor is a view of a storage.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np
from etils import epath

from trainer.config.errors import UserError

# The first numbers of the older format.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_STORAGES = {
    'BFloat16Storage': ml_dtypes.bfloat16,
    'BoolStorage': np.bool_,
    'ByteStorage': np.uint8,
    'CharStorage': np.int8,
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'IntStorage': np.int32,
    'LongStorage': np.int64,
    'ShortStorage': np.int16,
}


class _Fixed:
    """An object whose attributes a file cannot set, as a pickle may do with all that it names."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it sets attributes of an object that has none in PyTorch')


@dataclasses.dataclass(frozen=True)
class _Storage(_Fixed):
    """A sequence of numbers in the file, which tensors refer to before it is read."""

    key: str
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor(_Fixed):
    """A view of a storage: first number, and shape and strides in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, contents: bytes) -> np.ndarray:
        """Returns the array; bfloat16 as float32, as everywhere for PyTorch.

        Args:
            contents: of the storage.

        Raises:
            ValueError: if the view reaches beyond the storage, or has more numbers.
        """
        numbers = np.frombuffer(contents, self.storage.dtype)
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        size = math.prod(self.shape)
        # With strides of 0, a few bytes could ask for an array that fills the memory.
        end = max(self.offset + reach + 1, size) if size else 0
        if min((self.offset, *self.shape, *self.strides)) < 0 or end > len(numbers):
            raise ValueError(f'a tensor of shape {self.shape} does not fit into its storage')
        if not end:
            return np.zeros(self.shape, numbers.dtype)
        strides = [stride * numbers.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides)
        return view.astype(np.float32 if numbers.dtype == ml_dtypes.bfloat16 else numbers.dtype)


@dataclasses.dataclass(frozen=True)
class _Function(_Fixed):
    """What a file calls under the name of a function or class of PyTorch."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _State(dict):
    """A dict that ignores what is stored beside its entries, such as the versions of modules."""

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# All that a file may name, and what it gets. Nothing here can be changed by a pickle, because the
# next file gets the same.
_ALLOWED: dict[tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): _Function(_State),
    ('torch', 'Size'): tuple,
    ('torch._utils', '_rebuild_tensor_v2'): _Function(_rebuild_tensor),
    ('torch._utils', '_rebuild_parameter'): _Function(lambda tensor, *rest: tensor),
    **{('torch', name): name for name in _STORAGES},
}


class _Forbidden(pickle.UnpicklingError):
    """A name that is not allowed."""


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in `_ALLOWED`, and storages, which it collects."""

    def __init__(self, opened: IO[bytes]):
        super().__init__(opened)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name."""
        if (module, name) not in _ALLOWED:
            raise _Forbidden(f'{module}.{name}')
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage with an id: ('storage', its class, key, device, size), and None."""
        kind, name, key, *rest = pid
        # The older format may have views of storages, which PyTorch has not written since 0.4.
        if kind != 'storage' or name not in _STORAGES or rest[2:] not in ([], [None]):
            raise ValueError(f'an unknown kind of storage: {pid}')
        dtype = np.dtype(_STORAGES[name])
        return self.storages.setdefault(str(key), _Storage(str(key), dtype))


def read(file: epath.Path) -> Any:
    """Returns what a file contains, with arrays for tensors.

    Raises:
        UserError: if the file contains anything but tensors in dicts, lists and tuples, numbers
            and text, or is damaged.
    """
    with file.open('rb') as opened:
        is_zip = opened.read(2) == b'PK'
        opened.seek(0)
        try:
            tree, contents = (_read_zip if is_zip else _read_older)(opened)
            return _fill(tree, contents, {})
        except _Forbidden as error:
            raise UserError(
                f'{file} contains {error}, an object other than a tensor, and unpickling it could '
                'run any code; save only the tensors: torch.save(model.state_dict(), ...). If it '
                'is harmless, such as torch.device, PyTorch can read it: pip install torch'
            ) from error
        except Exception as error:  # A damaged pickle may raise anything.
            raise UserError(
                f'{file} cannot be read as a file of torch.save ({type(error).__name__}: {error}); '
                'it is damaged, or of another format, which PyTorch may read: pip install torch'
            ) from error


def _read_older(opened: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    """Returns the tree, and the contents of the storages by key."""
    magic, protocol, system = (_Unpickler(opened).load() for _ in range(3))
    if (magic, protocol, system['little_endian']) != (_MAGIC, _PROTOCOL, True):
        raise ValueError('expected the format of PyTorch 0.1.10 to 1.5, little-endian')
    unpickler = _Unpickler(opened)
    tree = unpickler.load()
    contents = {}
    for key in _Unpickler(opened).load():
        size = int.from_bytes(opened.read(8), 'little')
        contents[key] = opened.read(size * unpickler.storages[key].dtype.itemsize)
    return tree, contents


def _read_zip(opened: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    """Returns the tree, and the contents of the storages by key."""
    archive = zipfile.ZipFile(opened)
    names = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    if len(names) != 1:
        raise ValueError(f'expected a zip archive with one file data.pkl, found {len(names)}')
    root = names[0].removesuffix('/data.pkl')
    order = f'{root}/byteorder'
    if order in archive.namelist() and archive.read(order) != b'little':
        raise ValueError('expected little-endian numbers')
    with archive.open(names[0]) as pickled:
        unpickler = _Unpickler(pickled)
        tree = unpickler.load()
    return tree, {key: archive.read(f'{root}/data/{key}') for key in unpickler.storages}


def _fill(node: Any, contents: dict[str, bytes], done: dict[int, Any]) -> Any:
    """Returns a node of the tree with arrays for tensors.

    Args:
        node: of the tree.
        contents: of the storages, by key.
        done: results by id of their node: what occurs many times in the tree is read once.
    """
    if id(node) in done:
        return done[id(node)]
    result = node
    if isinstance(node, dict):
        result = {key: _fill(value, contents, done) for key, value in node.items()}
    elif isinstance(node, list | tuple):
        result = [_fill(value, contents, done) for value in node]
    elif isinstance(node, _Tensor):
        result = node.read(contents[node.storage.key])
    done[id(node)] = result
    return result
