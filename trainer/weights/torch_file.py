# SPDX-License-Identifier: Apache-2.0
"""Reads the weights in files of `torch.save`: a state_dict, or a checkpoint that contains one.

By PyTorch where it is installed, which also knows rare kinds of tensors, and otherwise by
`torch_pickle`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from trainer.checkpoint.errors import first_line
from trainer.config.errors import UserError
from trainer.weights import torch_layout, torch_pickle

_SUFFIXES = ('.pt', '.pth', '.bin')
# The first bytes of such files, for those with other names ('.ckpt', '.tar'): a zip archive, or the
# magic number of PyTorch before 1.6.
_ZIP = b'PK\x03\x04'
_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def is_torch_file(file: epath.Path) -> bool:
    """Whether a file was written by PyTorch, judging by its name or its first bytes."""
    if file.suffix in _SUFFIXES:
        return True
    with file.open('rb') as opened:
        return bool(opened.read(len(_MAGIC)).startswith((_ZIP, _MAGIC)))


def read(file: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name, 'model.fc.weight' for {'model': {'fc.weight': ...}}.

    Other values (an epoch, a learning rate) are ignored. If the file has a key 'state_dict', only
    the tensors below it are returned.

    Raises:
        UserError: if the file is damaged, or contains objects other than tensors.
    """
    if file.suffix == '.npz':  # A zip archive too.
        raise UserError(
            f'{file} is a numpy archive, which is not supported; convert it with '
            'trainer.weights.safetensors.write'
        )
    try:
        import torch
    except ImportError:
        return _collect_tensors(torch_pickle.read(file), file)
    try:
        # `weights_only`: unpickling other objects could run any code.
        tree = torch.load(os.fspath(file), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f'{file} contains objects other than tensors, and unpickling them could run any code; '
            'save only the tensors: torch.save(model.state_dict(), ...)'
        ) from error
    except Exception as error:
        raise UserError(f'PyTorch cannot read {file}: {first_line(error)}') from error
    return _collect_tensors(tree, file)


def _collect_tensors(tree: Any, file: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name, or those below 'state_dict' if there are some."""
    tensors = dict(_iterate_tensors(tree, ''))
    inner = {name: x for name, x in tensors.items() if name.startswith('state_dict.')}
    if not tensors:
        raise UserError(f'{file} contains no named tensors')
    return {name.removeprefix('state_dict.'): x for name, x in (inner or tensors).items()}


def _iterate_tensors(tree: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _iterate_tensors(value, f'{name}.{key}' if name else str(key))
    # A tensor or parameter, of PyTorch or read without it; a bare one has no name.
    elif name and (hasattr(tree, 'detach') or isinstance(tree, np.ndarray)):
        yield name, torch_layout.as_numpy(tree)
