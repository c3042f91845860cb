# SPDX-License-Identifier: Apache-2.0
"""A tagger of words by their characters and the words around them.

B: batch, L: words of a sentence, C: characters of a word, E: width of a character's embedding,
D: width of a word's vector, H: units in each direction, T: tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Ids of words and characters.
PADDING, UNKNOWN = 0, 1


class Characters(nn.Module):
    """Encodes a word by its characters, with convolutions (Ma and Hovy, arXiv:1603.01354).

    Attributes:
        vocab_size: number of characters, with padding.
        width: width of a character's embedding.
        filters: number of filters of each size.
        sizes: sizes of the filters, in characters.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int
    width: int = 32
    filters: int = 64
    sizes: tuple[int, ...] = (3, 5)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """Returns (B, L, filters x sizes) for int (B, L, C), padded with 0."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x_BLCE = nn.Embed(self.vocab_size, self.width, name='embed', **dtypes)(characters)
        is_real = (characters != PADDING)[..., None]
        # Zero, as beyond the array: so a filter sees where a word ends, whatever its padding.
        x_BLCE = jnp.where(is_real, x_BLCE, 0)
        found = []
        for size in self.sizes:
            y = nn.relu(nn.Conv(self.filters, (size,), name=f'size_{size}', **dtypes)(x_BLCE))
            found.append(jnp.where(is_real, y, 0).max(axis=2))
        return jnp.concatenate(found, axis=-1)


class Tagger(nn.Module):
    """A bidirectional LSTM over words, each read whole, if it is frequent, and letter by letter.

    Attributes:
        num_tags: number of tags.
        num_words: number of ids of words: 0 is padding, 1 an unknown word.
        num_characters: number of ids of characters: 0 is padding.
        word_width: width of a word's embedding; 0 to read the characters only.
        filters: filters of each size over the characters; 0 to read the words only.
        hidden: units of the LSTM in each direction.
        dropout_rate: dropout before and after the LSTM in training.
        word_dropout_rate: probability of reading a word as an unknown one in training, so that the
            model learns to tag these.
        dtype: dtype of the computation; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    num_tags: int
    num_words: int = 8192
    num_characters: int = 128
    word_width: int = 64
    filters: int = 64
    hidden: int = 128
    dropout_rate: float = 0.0
    word_dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        """Returns logits (B, L, T), for padding too.

        Args:
            inputs: 'words', int (B, L), and 'characters', int (B, L, C), both padded with 0 at the
                end. Those of padding do not change the logits of a word.
            train: whether dropout is active.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        words = inputs['words']
        is_real = words != PADDING
        parts = []
        if self.word_width:
            if train and self.word_dropout_rate:
                key = self.make_rng('dropout')
                is_dropped = jax.random.bernoulli(key, self.word_dropout_rate, words.shape)
                words = jnp.where(is_dropped & is_real, UNKNOWN, words)
            parts.append(nn.Embed(self.num_words, self.word_width, name='words', **dtypes)(words))
        if self.filters:
            characters = Characters(
                self.num_characters, filters=self.filters, name='characters', **dtypes
            )
            parts.append(characters(inputs['characters']))
        x_BLD = dropout(jnp.concatenate(parts, axis=-1))
        x_BL2H = dropout(self._read_both_ways(x_BLD, is_real.sum(axis=1)))
        return nn.Dense(self.num_tags, name='tags', **dtypes)(x_BL2H)

    def _read_both_ways(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns the states of both directions after each word, (B, L, 2 H)."""

        def read(name: str) -> nn.RNN:
            cell = nn.OptimizedLSTMCell(
                self.hidden,
                recurrent_kernel_init=_orthogonal,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f'{name}_cell',
            )
            return nn.RNN(cell, name=name)

        # Flax's own initial carry has the dtype of the parameters, and a float32 carry would make
        # all later computation float32.
        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        start = ((zeros, zeros), (zeros, zeros))
        both: Any = nn.Bidirectional(read('forward'), read('backward'), name='lstm')
        return both(x, seq_lengths=lengths, initial_carry=start)


def _orthogonal(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **rest: Any) -> jax.Array:
    """Initializes orthogonal columns, also in half precision, where JAX has no QR decomposition."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nn.initializers.orthogonal()(key, shape, wide, **rest).astype(dtype)
