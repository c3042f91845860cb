# SPDX-License-Identifier: Apache-2.0
"""PyTorch's tensors in the names and shapes of a Flax model.

The model decides: for each of its arrays the tensor of the same module is sought, and turned into
what the array is for. A kernel of two dimensions is the transpose of a linear layer's weight, one
of four has its dimensions moved ('OIHW' to 'HWIO'), an embedding stays as it is. A transposed
convolution is that of PyTorch with `transpose_kernel=True`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.text import indented_list
from trainer.weights import torch_recurrent
from trainer.weights.leaves import HostLeaf, Weights

# A module's path and the (channels, height, width) that it gets as one dimension.
Flatten = tuple[str, tuple[int, int, int]]

# What the tensors of a module are called, for each array of a Flax layer.
_NAMES = {
    'kernel': ('weight',),
    'bias': ('bias', 'beta'),
    'scale': ('weight', 'gamma'),
    'embedding': ('weight',),
    'mean': ('running_mean',),
    'var': ('running_var',),
    'negative_slope': ('weight',),
}
# The parts of `torch.nn.MultiheadAttention`, whose projections lie in one tensor.
_PROJECTIONS = ('query', 'key', 'value')


def as_numpy(tensor: Any) -> np.ndarray:
    """Returns a tensor's values; bfloat16, which numpy does not know, as float32."""
    if not hasattr(tensor, 'detach'):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == 'torch.bfloat16' else tensor).numpy()


def convert(
    tensors: Mapping[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    flatten: Sequence[Flatten] = (),
    where: str = 'flatten',
) -> tuple[Weights, set[str]]:
    """Returns the weights that were found, and the names of the tensors that they are made of.

    An array whose size fits another shape (the heads of an attention) gets that shape; one that
    does not fit keeps its own, for a resize or an error message.

    Args:
        tensors: arrays of PyTorch by path, '/' for '.': 'layer1/0/conv1/weight'. Whoever has other
            names in the model renames them before.
        wanted: the model's shapes, by path: 'params/conv/kernel', 'batch_stats/norm/mean'.
        flatten: patterns of dense layers that follow a flattening of channels, height and width.
            PyTorch flattens in that order, Flax with the channels last: their rows are put in its
            order, so that the model needs no transpose.
        where: what messages call `flatten`.

    Raises:
        UserError: if a pattern of `flatten` matches no dense layer, or one of another size.
    """
    _check_used(flatten, wanted, where)
    found: Weights = {}
    used: set[str] = set()
    for path, shape in wanted.items():
        _, *module, leaf = path.split('/')
        for names, array in _sources(tensors, module, leaf, wanted):
            if leaf == 'kernel':
                array = _kernel(array, '/'.join(module), flatten, where)
            fits = array.size == np.prod(shape, dtype=int) and leaf in _NAMES
            found[path] = HostLeaf(array.reshape(shape) if fits and _alike(array, shape) else array)
            used.update(names)
            break
    return found, used


def _sources(
    tensors: Mapping[str, Any], module: list[str], leaf: str, wanted: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields (names, tensor) of what the array may be made of."""
    for name in (*_NAMES.get(leaf, ()), leaf):
        path = '/'.join((*module, name))
        if path in tensors:
            yield (path,), np.asarray(tensors[path])
    last = module[-1] if module else ''
    if last in _PROJECTIONS and leaf in ('kernel', 'bias'):
        path = '/'.join((*module[:-1], f'in_proj_{"weight" if leaf == "kernel" else "bias"}'))
        if path in tensors:
            yield (path,), np.split(np.asarray(tensors[path]), 3)[_PROJECTIONS.index(last)]
        # Keys and values of other widths than the queries have tensors of their own.
        path = '/'.join((*module[:-1], f'{last[0]}_proj_weight'))
        if path in tensors and leaf == 'kernel':
            yield (path,), np.asarray(tensors[path])
    if last == 'out':
        yield from _sources(tensors, [*module[:-1], 'out_proj'], leaf, wanted)
    yield from torch_recurrent.sources(tensors, module, leaf, wanted)


def _check_used(flatten: Sequence[Flatten], wanted: Mapping[str, Any], where: str) -> None:
    kernels = {
        '/'.join(keys[1:-1]): shape
        for keys, shape in ((path.split('/'), shape) for path, shape in wanted.items())
        if keys[-1] == 'kernel'
    }
    for pattern, _ in flatten:
        if not any(re.fullmatch(pattern, module) for module in kernels):
            dense = [module for module, shape in kernels.items() if len(shape) == 2]
            raise UserError(
                f'{where}: the pattern {pattern!r} matches no dense layer. A pattern must match '
                f'the whole path of one; there is\n{indented_list(dense)}'
            )


def _kernel(array: np.ndarray, module: str, flatten: Sequence[Flatten], where: str) -> np.ndarray:
    """Returns inputs before outputs, and the window's dimensions before both."""
    kernel = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim >= 2 else array
    for pattern, sizes in flatten:
        if re.fullmatch(pattern, module):
            return _channels_last(kernel, module, sizes, where)
    return kernel


def _channels_last(kernel: np.ndarray, module: str, sizes: Sequence[int], where: str) -> np.ndarray:
    """Returns a dense layer's kernel with its rows, one for each input, in the order of Flax."""
    if kernel.ndim != 2:
        shape = list(kernel.shape)
        raise UserError(f'{where}: {module} is no dense layer, its kernel has the shape {shape}')
    if len(sizes) != 3 or min(sizes) < 1 or math.prod(sizes) != len(kernel):
        raise UserError(
            f'{where}: {module} has {len(kernel)} inputs, which are not those of {tuple(sizes)}. '
            'Expected is the (channels, height, width) that PyTorch flattens before that layer'
        )
    channels, height, width = sizes
    rows = kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
    return rows.reshape(kernel.shape)


def _alike(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether dimensions are only split or joined: a square matrix is never a transposed one."""
    return array.ndim != len(shape) or array.shape == shape
