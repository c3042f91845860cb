# SPDX-License-Identifier: Apache-2.0
"""Converted recurrent layers of PyTorch give the same outputs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trainer.config.errors import UserError
from trainer.weights import restore

torch = pytest.importorskip('torch')
F = torch.nn
X = np.random.default_rng(0).normal(size=(2, 5, 4)).astype('f4')
CELLS = {
    'LSTM': nn.LSTMCell, 'OptimizedLSTM': nn.OptimizedLSTMCell, 'GRU': nn.GRUCell,
    'RNN': nn.SimpleCell,
}  # fmt: skip
# 'rnn/weight_ih_l1_reverse' is in the second layer's backward cell.
LAYERS = ((r'/(\w+)_l(\d)_reverse$', r'_\2/backward/\1'), (r'/(\w+)_l(\d)$', r'_\2/forward/\1'))


def layer(kind: str, inputs: int = 4, **options: Any) -> Any:
    """A recurrent layer, named 'rnn', whose biases are not zero."""
    torch.manual_seed(0)
    kind = kind.removeprefix('Optimized')
    return F.ModuleDict({'rnn': getattr(F, kind)(inputs, 6, batch_first=True, **options)})


def close(mine: Any, theirs: Any) -> None:
    theirs = theirs.detach().numpy()
    assert mine.shape == theirs.shape
    assert abs(np.asarray(mine) - theirs).max() <= 1e-5 * abs(theirs).max()


class OneLayer(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.RNN(CELLS[self.kind](6, name='rnn'))(x)


@pytest.mark.parametrize('kind', list(CELLS))
def test_one_layer(kind: str) -> None:
    """A tensor has all gates, a module of Flax one; the two biases of a gate are added."""
    theirs, mine = layer(kind), OneLayer(kind)
    variables = mine.init(jax.random.key(0), X)
    loaded = restore.torch_variables(theirs.state_dict(), variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    close(mine.apply(loaded, X), theirs['rnn'](torch.from_numpy(X))[0])


class Cells(nn.Module):
    """A bidirectional layer."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        forward, backward = (
            nn.RNN(CELLS[self.kind](6, name=name)) for name in ('forward', 'backward')
        )
        return nn.Bidirectional(forward, backward)(x)


class Deep(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(2):
            x = Cells(self.kind, name=f'rnn_{number}')(x)
        return x


@pytest.mark.parametrize('kind', ['OptimizedLSTM', 'GRU'])
def test_two_layers_in_both_directions(kind: str) -> None:
    """A rename maps layers and directions to cells."""
    theirs, mine = layer(kind, num_layers=2, bidirectional=True), Deep(kind)
    variables = mine.init(jax.random.key(0), X)
    loaded = restore.torch_variables(theirs.state_dict(), variables, rename=LAYERS)
    close(mine.apply(loaded, X), theirs['rnn'](torch.from_numpy(X))[0])


@pytest.mark.parametrize(
    ('kind', 'cell'),
    [('LSTM', nnx.LSTMCell), ('LSTM', nnx.OptimizedLSTMCell), ('RNN', nnx.SimpleCell)],
)
def test_cells_of_nnx(kind: str, cell: Any) -> None:
    """Some cells have one dense layer for all gates."""
    theirs, mine = layer(kind), nnx.RNN(cell(4, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(mine, nnx.Param))
    loaded = restore.torch_variables(
        theirs.state_dict(), {'params': params}, rename=(('^rnn/', 'cell/'),)
    )
    nnx.update(mine, loaded['params'])
    close(mine(jnp.asarray(X)), theirs['rnn'](torch.from_numpy(X))[0])


def test_a_gru_that_nnx_does_not_have() -> None:
    """NNX has no bias after the reset gate; if that is zero, the cells are equal."""
    theirs, mine = layer('GRU'), nnx.GRUCell(4, 6, rngs=nnx.Rngs(0))
    goal = {'params': {'rnn': nnx.to_pure_dict(nnx.state(mine, nnx.Param))}}
    with pytest.raises(
        UserError, match=r'rnn\.bias_hh_l0: the GRU of PyTorch multiplies this bias'
    ):
        restore.torch_variables(theirs.state_dict(), goal)
    with torch.no_grad():
        theirs['rnn'].bias_hh_l0[12:] = 0
    loaded = restore.torch_variables(theirs.state_dict(), goal)
    nnx.update(mine, loaded['params']['rnn'])
    rnn = nnx.RNN(mine, rngs=nnx.Rngs(0))
    close(rnn(jnp.asarray(X)), theirs['rnn'](torch.from_numpy(X))[0])


def test_unused_tensors_are_listed() -> None:
    """A second layer without a cell; a projected state, which Flax does not support."""
    mine = OneLayer('LSTM')
    variables = mine.init(jax.random.key(0), X)
    with pytest.raises(UserError, match=r'Not in the model:\n  rnn/weight_ih_l0'):
        restore.torch_variables(layer('LSTM', proj_size=2).state_dict(), variables)
    with pytest.raises(UserError, match=r'rnn/if/kernel: got float32\[5, 6\]'):
        restore.torch_variables(layer('LSTM', inputs=5).state_dict(), variables)
