# SPDX-License-Identifier: Apache-2.0
"""Converts recurrent layers of PyTorch, which has all gates in one tensor, to cells of Flax."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from trainer.config.errors import UserError

# The gates in the order of PyTorch's rows, by their number: a simple cell, a GRU, an LSTM.
_GATES: dict[int, tuple[str, ...]] = {1: ('',), 3: ('r', 'z', 'n'), 4: ('i', 'f', 'g', 'o')}
# The ends of the tensor names: of a cell, and of the first layer of an RNN. `rename` maps others.
_SUFFIXES = ('', '_l0')
# Flax's dense layers of all gates at once: of the inputs, and of the previous state.
_SIDES = {'dense_i': 'i', 'dense_h': 'h'}


def candidates(
    tensors: Mapping[str, Any], module: list[str], leaf: str, wanted: Container[str]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the array of a dense layer in a Flax cell, with the names of its tensors.

    Args:
        tensors: arrays of PyTorch by path: 'rnn/weight_ih_l0', or 'rnn/weight_ih' of a cell.
        module: names along the path of the dense layer; the last one is such as 'hf' or 'dense_i'.
        leaf: 'kernel' or 'bias'.
        wanted: the paths of the model's parameters.

    Raises:
        UserError: if the cell has no counterpart of a bias.
    """
    name = module[-1].rstrip('_') if module else ''
    side, gate = (_SIDES[name], None) if name in _SIDES else (name[:1], name[1:])
    parts = [_find_layer(tensors, '/'.join(module[:-1]), suffix) for suffix in _SUFFIXES]
    layer = next(filter(None, parts), None)
    if side not in ('i', 'h') or layer is None:
        return
    prefix, suffix, gates = layer
    if gate is not None and gate not in gates:
        return
    kinds = [f'{leaf}_{side}h']
    if leaf == 'kernel':
        kinds = [f'weight_{side}h']
    elif leaf == 'bias' and not _has_bias(module, side, wanted):
        # Flax has one bias for both sides: PyTorch's two are added.
        kinds = ['bias_ih', 'bias_hh']
    names = tuple(f'{prefix}{kind}{suffix}' for kind in kinds)
    if not all(name in tensors for name in names):
        return
    arrays = [np.asarray(tensors[name]) for name in names]
    if gate is None and len(gates) == 3 and len(arrays) == 2:
        _check_state_bias(arrays[1], names[1])
    total = sum(arrays[1:], arrays[0])
    yield names, total if gate is None else np.split(total, len(gates))[gates.index(gate)]


def _find_layer(
    tensors: Mapping[str, Any], layer: str, suffix: str
) -> tuple[str, str, tuple[str, ...]] | None:
    """Returns prefix, suffix and gates of a layer's tensors; None if it has none."""
    prefix = f'{layer}/' if layer else ''
    weight = tensors.get(f'{prefix}weight_hh{suffix}')
    if weight is None or weight.ndim != 2:
        return None
    gates = _GATES.get(weight.shape[0] // weight.shape[1])
    return None if gates is None else (prefix, suffix, gates)


def _has_bias(module: list[str], side: str, wanted: Container[str]) -> bool:
    """Whether the other side of the same gate has a bias too: then PyTorch's two stay separate."""
    other = {'i': 'h', 'h': 'i'}[side]
    name = module[-1]
    twin = name[:-1] + other if name in _SIDES else other + name[1:]
    return '/'.join(('params', *module[:-1], twin, 'bias')) in wanted


def _check_state_bias(bias: np.ndarray, name: str) -> None:
    if np.split(bias, 3)[2].any():
        raise UserError(
            f'{name.replace("/", ".")}: the GRU of PyTorch multiplies this bias by its reset gate, '
            'and the cell of this model does not: use the GRUCell of flax.linen'
        )
