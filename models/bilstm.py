# SPDX-License-Identifier: Apache-2.0
"""A bidirectional LSTM that classifies texts of different lengths.

B: batch, L: length of the texts with padding, E: width of the embeddings,
H: units in each direction, C: classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BiLSTM(nn.Module):
    """Classifies a text by the maximum over its words of the outputs of both directions.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        num_classes: number of logits.
        width: width of the word embeddings.
        hidden: units in each direction.
        dropout_rate: dropout of the embeddings and of the text's vector in training.
        word_dropout_rate: probability that a word becomes the unknown word in training.
        pad_token: the token of padding, at the end of a text.
        unknown_token: the token of an unknown word.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int
    num_classes: int = 1
    width: int = 128
    hidden: int = 128
    dropout_rate: float = 0.0
    word_dropout_rate: float = 0.0
    pad_token: int = 0
    unknown_token: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (B, C) for integer tokens (B, L)."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        is_real = tokens != self.pad_token
        lengths = is_real.sum(-1)
        if train and self.word_dropout_rate:
            # Otherwise the model knows each of the few training sentences by its rare words.
            key = self.make_rng('dropout')
            dropped = jax.random.bernoulli(key, self.word_dropout_rate, tokens.shape)
            tokens = jnp.where(dropped & is_real, self.unknown_token, tokens)
        x_BLE = nn.Embed(self.vocab_size, self.width, name='embed', **dtypes)(tokens)
        x_BLE = dropout(x_BLE)

        forward, backward = (
            nn.RNN(nn.OptimizedLSTMCell(self.hidden, recurrent_kernel_init=_orthogonal, **dtypes))
            for _ in range(2)
        )
        # Flax's own initial carry has the dtype of the parameters, and a float32 carry would make
        # all later computation float32.
        zeros = jnp.zeros((tokens.shape[0], self.hidden), x_BLE.dtype)
        # `seq_lengths` begins the backward direction at the last word, not at the padding.
        x_BL2H: Any = nn.Bidirectional(forward, backward, name='lstm')(
            x_BLE, seq_lengths=lengths, initial_carry=((zeros, zeros), (zeros, zeros))
        )
        # The outputs are between -1 and 1, so padding is never the maximum. Of an empty text, the
        # maximum is 0, not that of the padding.
        x_B2H = jnp.where(is_real[:, :, None], x_BL2H, -1).max(1)
        x_B2H = dropout(jnp.where(lengths[:, None] > 0, x_B2H, 0))
        return nn.Dense(self.num_classes, name='head', **dtypes)(x_B2H)


def _orthogonal(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **rest: Any) -> jax.Array:
    """Initializes orthogonal columns, also in half precision, where JAX has no QR decomposition."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide, **rest).astype(dtype)
