# SPDX-License-Identifier: Apache-2.0
"""The recurrent layers of PyTorch, whose gates lie in one tensor, as Flax's cells hold them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from trainer.config.errors import UserError

# The gates in the order of PyTorch's rows, by their number: Elman's cell, a GRU, an LSTM.
_GATES: dict[int, tuple[str, ...]] = {1: ('',), 3: ('r', 'z', 'n'), 4: ('i', 'f', 'g', 'o')}
# A layer's first tensors, and those of a cell; other layers are named so by a rename.
_SUFFIXES = ('', '_l0')
# Flax's names of what is done with the inputs and with the state before, in all gates at once.
_SIDES = {'dense_i': 'i', 'dense_h': 'h'}


def sources(
    tensors: Mapping[str, Any], module: list[str], leaf: str, wanted: Container[str]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the array of a dense layer of a Flax cell, and the tensors that it is made of.

    Args:
        tensors: arrays of PyTorch by path: 'rnn/weight_ih_l0', or 'rnn/weight_ih' of a cell.
        module: path of the dense layer in the cell: its last name is such as 'hf', or 'dense_i'.
        leaf: 'kernel' or 'bias'.
        wanted: the paths of the model's parameters.

    Raises:
        UserError: if the cell has no place for one of the biases.
    """
    name = module[-1].rstrip('_') if module else ''
    side, gate = (_SIDES[name], None) if name in _SIDES else (name[:1], name[1:])
    parts = [_parts(tensors, '/'.join(module[:-1]), suffix) for suffix in _SUFFIXES]
    found = next(filter(None, parts), None)
    if side not in ('i', 'h') or found is None:
        return
    prefix, suffix, gates = found
    if gate is not None and gate not in gates:
        return
    kinds = [f'{leaf}_{side}h']
    if leaf == 'kernel':
        kinds = [f'weight_{side}h']
    elif leaf == 'bias' and not _has_bias(module, side, wanted):
        kinds = ['bias_ih', 'bias_hh']  # Flax has one of the two.
    names = tuple(f'{prefix}{kind}{suffix}' for kind in kinds)
    if not all(name in tensors for name in names):
        return
    arrays = [np.asarray(tensors[name]) for name in names]
    if gate is None and len(gates) == 3 and len(arrays) == 2:
        _check_state_bias(arrays[1], names[1])
    total = sum(arrays[1:], arrays[0])
    yield names, total if gate is None else np.split(total, len(gates))[gates.index(gate)]


def _parts(
    tensors: Mapping[str, Any], layer: str, suffix: str
) -> tuple[str, str, tuple[str, ...]] | None:
    """Returns prefix, suffix and gates of a layer's tensors, if they are there."""
    prefix = f'{layer}/' if layer else ''
    weight = tensors.get(f'{prefix}weight_hh{suffix}')
    if weight is None or weight.ndim != 2:
        return None
    gates = _GATES.get(weight.shape[0] // weight.shape[1])
    return None if gates is None else (prefix, suffix, gates)


def _has_bias(module: list[str], side: str, wanted: Container[str]) -> bool:
    """Whether the same gate has a bias on the other side too: then each keeps its own."""
    other = {'i': 'h', 'h': 'i'}[side]
    name = module[-1]
    twin = name[:-1] + other if name in _SIDES else other + name[1:]
    return '/'.join(('params', *module[:-1], twin, 'bias')) in wanted


def _check_state_bias(bias: np.ndarray, name: str) -> None:
    if np.split(bias, 3)[2].any():
        raise UserError(
            f'{name.replace("/", ".")}: a GRU of PyTorch multiplies a bias by its reset gate, and '
            'this cell has none there: use the GRUCell of flax.linen'
        )
