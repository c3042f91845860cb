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
        teacher_force: whether the decoder reads the targets; otherwise, it reads the tokens that it
            finds most probable itself.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int
    hidden: int = 128
    dropout_rate: float = 0.0
    teacher_force: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers, which the methods share."""
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
        """Returns logits (B, T, V) of each target, given the inputs and the tokens before it.

        Args:
            inputs: int (B, L).
            lengths: int (B,), the number of inputs without padding.
            targets: int (B, T); only their number matters without teacher forcing.
            train: whether dropout is active.
        """
        carry = self.encode(inputs, lengths)
        if not self.teacher_force:
            return self._continue(carry, targets.shape[1], train)[1]
        # The decoder reads the targets shifted by one, after the start token 0.
        previous = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        return self.decode(previous, carry, train)[0]

    def greedy(self, inputs: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
        """Decodes greedily: returns the most probable tokens, int (B, count).

        Args:
            inputs: int (B, L).
            lengths: int (B,), the number of inputs without padding.
            count: number of tokens to generate.
        """
        return self._continue(self.encode(inputs, lengths), count)[0]

    def decode(self, tokens: jax.Array, carry: Any, train: bool = False) -> tuple[jax.Array, Any]:
        """Returns logits (B, T, V) of the token after each, and the carry after all of them.

        `trainer.models.generation:generate` takes it as `extend`, with the carry of `encode` as the
        cache and the token 0 as the prompt.

        Args:
            tokens: int (B, T).
            carry: that of `encode`, or of an earlier call.
            train: whether dropout is active.
        """
        carry, y = self.decoder(self.embed(tokens), initial_carry=carry, return_carry=True)
        return self.logits(self.dropout(y, deterministic=not train)), carry

    def encode(self, inputs: jax.Array, lengths: jax.Array) -> Any:
        """Returns the decoder's first carry, two arrays (B, 2 x H).

        Args:
            inputs: int (B, L).
            lengths: int (B,), the number of inputs without padding.
        """
        x = self.embed(inputs)
        # Flax's own initial carry has the dtype of the parameters, and a float32 carry would make
        # all later computation float32.
        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        start = ((zeros, zeros), (zeros, zeros))
        carries, _ = self.encoder(x, seq_lengths=lengths, initial_carry=start)
        carry = jax.tree.map(lambda *both: jnp.concatenate(both, -1), *carries)
        # For an empty text Flax returns the carry after all of the padding.
        return jax.tree.map(lambda x: jnp.where(lengths[:, None] > 0, x, 0), carry)

    def _continue(self, carry: Any, count: int, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the most probable tokens (B, count), each after those before, and the logits."""

        def add_token(module: Seq2Seq, state: Any, _: Any) -> Any:
            token, carry = state
            logits, carry = module.decode(token, carry, train)
            token = logits.argmax(-1)
            return (token, carry), (token[:, 0], logits[:, 0])

        scan = nn.scan(
            add_token,
            variable_broadcast='params',
            split_rngs={'params': False, 'dropout': True},
            out_axes=1,
            length=count,
        )
        start = jnp.zeros((len(carry[0]), 1), jnp.int32)
        tokens, logits = scan(self, (start, carry), None)[1]
        return tokens, logits


def _orthogonal(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **rest: Any) -> jax.Array:
    """Initializes orthogonal columns, also in half precision, where JAX has no QR decomposition."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide, **rest).astype(dtype)
