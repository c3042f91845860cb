# SPDX-License-Identifier: Apache-2.0
"""Converts tensors of PyTorch to the names and shapes of a Flax model.

The model decides: for each of its arrays, the tensor of the same module is looked up and converted.
A kernel of a dense layer is transposed, one of a convolution has its dimensions moved ('OIHW' to
'HWIO'), an embedding stays. A transposed convolution equals PyTorch's if the Flax layer has
`transpose_kernel=True`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.modules import patterns
from trainer.weights import torch_recurrent
from trainer.weights.leaves import HostLeaf, Weights

# A pattern of module paths, and the (channels, height, width) that are flattened before the module.
Flatten = tuple[str, tuple[int, int, int]]

# The names of PyTorch's tensor for each array of a Flax layer; 'gamma' and 'beta' are of old BERTs.
_NAMES = {
    'kernel': ('weight',),
    'bias': ('bias', 'beta'),
    'scale': ('weight', 'gamma'),
    'embedding': ('weight',),
    'mean': ('running_mean',),
    'var': ('running_var',),
    'negative_slope': ('weight',),
}
# The projections that `torch.nn.MultiheadAttention` has in one tensor, in its order.
_PROJECTIONS = ('query', 'key', 'value')


def as_numpy(tensor: Any) -> np.ndarray:
    """Returns a tensor as a numpy array; bfloat16 as float32, because `Tensor.numpy` refuses it."""
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
    """Returns the weights that have a tensor, and the names of the tensors that were used.

    An array of the same size as the model's is reshaped (the heads of an attention). One of another
    size keeps its shape, for `Resize` or an error message.

    Args:
        tensors: arrays of PyTorch by path, with '/' for '.': 'layer1/0/conv1/weight'. Modules must
            already have the names of the Flax model.
        wanted: the model's shapes, by path: 'params/conv/kernel', 'batch_stats/norm/mean'.
        flatten: patterns of dense layers that follow a flattening of channels, height and width.
            PyTorch flattens in that order, Flax with the channels last, so the rows of their
            kernels are reordered, and the model needs no transpose.
        where: name of `flatten` in messages.

    Raises:
        UserError: if a pattern of `flatten` matches no dense layer, or one of another size.
    """
    _check_flatten(flatten, wanted, where)
    weights: Weights = {}
    used: set[str] = set()
    for path, shape in wanted.items():
        _, *module, leaf = path.split('/')
        for names, array in _candidates(tensors, module, leaf, wanted):
            if leaf == 'kernel':
                array = _convert_kernel(array, '/'.join(module), flatten, where)
            fits = array.size == np.prod(shape, dtype=int) and leaf in _NAMES
            weights[path] = HostLeaf(
                array.reshape(shape) if fits and _is_plain_reshape(array, shape) else array
            )
            used.update(names)
            break
    return weights, used


def _candidates(
    tensors: Mapping[str, Any], module: list[str], leaf: str, wanted: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the tensors that an array may come from, with their names; the first one is used."""
    # The last one for parameters that a module defines itself: they have one name on both sides.
    for name in (*_NAMES.get(leaf, ()), leaf):
        path = '/'.join((*module, name))
        if path in tensors:
            yield (path,), np.asarray(tensors[path])
    last = module[-1] if module else ''
    if last in _PROJECTIONS and leaf in ('kernel', 'bias'):
        path = '/'.join((*module[:-1], f'in_proj_{"weight" if leaf == "kernel" else "bias"}'))
        if path in tensors:
            yield (path,), np.split(np.asarray(tensors[path]), 3)[_PROJECTIONS.index(last)]
        # If keys and values have other widths than the queries, there are separate tensors.
        path = '/'.join((*module[:-1], f'{last[0]}_proj_weight'))
        if path in tensors and leaf == 'kernel':
            yield (path,), np.asarray(tensors[path])
    if last == 'out':
        yield from _candidates(tensors, [*module[:-1], 'out_proj'], leaf, wanted)
    yield from torch_recurrent.candidates(tensors, module, leaf, wanted)


def _check_flatten(flatten: Sequence[Flatten], wanted: Mapping[str, Any], where: str) -> None:
    kernels = {
        '/'.join(keys[1:-1]): shape
        for keys, shape in ((path.split('/'), shape) for path, shape in wanted.items())
        if keys[-1] == 'kernel'
    }
    dense = [module for module, shape in kernels.items() if len(shape) == 2]
    patterns.check_used([pattern for pattern, _ in flatten], dense, where, 'no dense layer')


def _convert_kernel(
    array: np.ndarray, module: str, flatten: Sequence[Flatten], where: str
) -> np.ndarray:
    """Returns a kernel in the order of Flax: window, inputs, outputs (PyTorch: outputs first)."""
    kernel = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim >= 2 else array
    for pattern, sizes in flatten:
        if re.fullmatch(pattern, module):
            return _reorder_rows(kernel, module, sizes, where)
    return kernel


def _reorder_rows(kernel: np.ndarray, module: str, sizes: Sequence[int], where: str) -> np.ndarray:
    """Returns a dense layer's kernel with its rows (inputs) in the order of Flax: channels last."""
    if kernel.ndim != 2:
        shape = list(kernel.shape)
        raise UserError(f'{where}: {module} is not a dense layer: its kernel has shape {shape}')
    if len(sizes) != 3 or min(sizes) < 1 or math.prod(sizes) != len(kernel):
        raise UserError(
            f'{where}: {module} has {len(kernel)} inputs, which does not fit {tuple(sizes)}. '
            'Expected the (channels, height, width) that PyTorch flattens before that layer'
        )
    channels, height, width = sizes
    rows = kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3)
    return rows.reshape(kernel.shape)


def _is_plain_reshape(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a reshape only splits or joins dimensions."""
    # With as many dimensions but another shape, it would scramble a transposed array.
    return array.ndim != len(shape) or array.shape == shape
