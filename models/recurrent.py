# SPDX-License-Identifier: Apache-2.0
"""A recurrent sequence-to-sequence model for texts of different lengths.

B: batch, L: length of the inputs, T: length of the targets, H: units, V: vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Seq2Seq(nn.Module):
    """A bidirectional LSTM encoder and an LSTM decoder.

    Attributes:
        vocab_size: size of the vocabulary. Token 0 starts the decoder's input.
        hidden: units of the encoder in each direction; the decoder has twice as many.
        dropout_rate: dropout of the decoder's output in training.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int
    hidden: int = 128
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, which `__call__` and `greedy` share."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def cell(units: int) -> nn.OptimizedLSTMCell:
            return nn.OptimizedLSTMCell(units, recurrent_kernel_init=_orthogonal, **dtypes)

        self.embed = nn.Embed(self.vocab_size, self.hidden, **dtypes)
        self.encoder = nn.Bidirectional(
            nn.RNN(cell(self.hidden)), nn.RNN(cell(self.hidden)), return_carry=True
        )
        self.cell = cell(2 * self.hidden)
        self.decoder = nn.RNN(self.cell)
        self.dropout = nn.Dropout(self.dropout_rate)
        self.logits = nn.Dense(self.vocab_size, **dtypes)

    def __call__(
        self, inputs: jax.Array, lengths: jax.Array, targets: jax.Array, train: bool = False
    ) -> jax.Array:
        """Returns logits (B, T, V) of each target, given the inputs and the previous targets.

        Args:
            inputs: int (B, L).
            lengths: int (B,), the number of inputs without padding.
            targets: int (B, T).
            train: whether dropout is active.
        """
        # Teacher forcing: the decoder reads the targets shifted by one, after the start token 0.
        previous = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        y = self.decoder(self.embed(previous), initial_carry=self._encode(inputs, lengths))
        return self.logits(self.dropout(y, deterministic=not train))

    def greedy(self, inputs: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
        """Decodes greedily: returns the most probable tokens, int (B, count).

        Args:
            inputs: int (B, L).
            lengths: int (B,), the number of inputs without padding.
            count: number of tokens to generate.
        """

        def generate(module: Seq2Seq, carry: Any, _: Any) -> Any:
            state, token = carry
            state, y = module.cell(state, module.embed(token))
            token = module.logits(y).argmax(-1)
            return (state, token), token

        step = nn.scan(
            generate, variable_broadcast='params', split_rngs={'params': False}, out_axes=1,
            length=count,
        )  # fmt: skip
        start = jnp.zeros(inputs.shape[0], jnp.int32)
        return step(self, (self._encode(inputs, lengths), start), None)[1]

    def _encode(self, inputs: jax.Array, lengths: jax.Array) -> Any:
        x = self.embed(inputs)
        # Flax's own initial carry has the dtype of the parameters, and a float32 carry would make
        # all later computation float32.
        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        start = ((zeros, zeros), (zeros, zeros))
        carries, _ = self.encoder(x, seq_lengths=lengths, initial_carry=start)
        carry = jax.tree.map(lambda *both: jnp.concatenate(both, -1), *carries)
        # For an empty text Flax returns the carry after all of the padding.
        return jax.tree.map(lambda x: jnp.where(lengths[:, None] > 0, x, 0), carry)


def _orthogonal(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **rest: Any) -> jax.Array:
    """Initializes orthogonal columns, also in half precision, where JAX has no QR decomposition."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide, **rest).astype(dtype)
