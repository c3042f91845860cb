# SPDX-License-Identifier: Apache-2.0
"""Files that PyTorch has saved: bare weights, or weights among other things."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from trainer.checkpoint.errors import first_line
from trainer.config.errors import UserError
from trainer.weights import torch_layout

_SUFFIXES = ('.pt', '.pth', '.bin')
# How such files begin whatever their name, such as '.ckpt' or '.tar': as an archive, or as the
# number that PyTorch wrote before it had archives.
_ZIP = b'PK\x03\x04'
_NUMBER = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def is_one(file: epath.Path) -> bool:
    """Whether it is for PyTorch to read the file."""
    if file.suffix in _SUFFIXES:
        return True
    with file.open('rb') as opened:
        return bool(opened.read(len(_NUMBER)).startswith((_ZIP, _NUMBER)))


def read(file: epath.Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name, 'model.fc.weight' for {'model': {'fc.weight': ...}}.

    What else is in the file (an epoch, a learning rate) is left out. Where a key of the file is
    'state_dict', the rest is left out too.

    Raises:
        UserError: without PyTorch, or if the file holds objects, which could run any code.
    """
    if file.suffix == '.npz':
        raise UserError(
            f'{file} is an archive of numpy, which is not read here; write its arrays with '
            'trainer.weights.safetensors.write'
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{file} is a file of PyTorch, which is not installed: install torch, or write the '
            'weights as safetensors'
        ) from error
    try:
        tree = torch.load(os.fspath(file), map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f'{file} holds other objects than tensors, and to load them is to run what is in them; '
            'write the tensors alone: torch.save(model.state_dict(), ...)'
        ) from error
    except Exception as error:
        raise UserError(f'{file} is no file that PyTorch reads: {first_line(error)}') from error
    tensors = dict(_tensors(tree, ''))
    inner = {name: x for name, x in tensors.items() if name.startswith('state_dict.')}
    if not tensors:
        raise UserError(f'{file} holds no tensors by name')
    return {name.removeprefix('state_dict.'): x for name, x in (inner or tensors).items()}


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f'{name}.{key}' if name else str(key))
    elif hasattr(tree, 'detach') and name:
        yield name, torch_layout.as_numpy(tree)
