# SPDX-License-Identifier: Apache-2.0
"""BERT's transformer encoder (Devlin et al., 2018), with heads for embeddings and classification.

Dimensions are named as in `trainer.models.transformer`; `config.sharding` maps the names to mesh
axes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .transformer import Attention

# Renames the weights of Hugging Face's BERT to those of `Encoder`, for `config.init_from.rename`.
# The rules are applied in this order, so the more specific paths come first.
HUGGING_FACE = (
    ('^embeddings/LayerNorm/', 'norm/'),
    (r'^embeddings/(\w+)_embeddings/', r'\1/'),
    (r'^encoder/layer/(\d+)/', r'layer_\1/'),
    ('/attention/self/', '/attention/'),
    ('/attention/output/dense/', '/attention/out/'),
    ('/attention/output/LayerNorm/', '/attention_norm/'),
    ('/intermediate/dense/', '/mlp_in/'),
    ('/output/dense/', '/mlp_out/'),
    ('/output/LayerNorm/', '/mlp_norm/'),
)


def _norm(name: str, **dtypes: Any) -> nn.LayerNorm:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    return nn.LayerNorm(
        epsilon=1e-12,  # As in the pretrained weights; Flax's default is 1e-6.
        scale_init=nn.with_logical_partitioning(ones, ('embed',)),
        bias_init=nn.with_logical_partitioning(zeros, ('embed',)),
        name=name,
        **dtypes,
    )


class Layer(nn.Module):
    """Attention and MLP, each normalized after its residual connection.

    Attributes:
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of the MLP.
        dropout_rate: probability of dropping an element of each branch's output in training.
        dtype: dtype of the computation; None follows inputs and parameters.
        param_dtype: dtype of the parameters.
    """

    heads: int
    mlp_width: int
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Returns (batch, length, width) for inputs of the same shape.

        Args:
            x: (batch, length, width).
            mask: bool, broadcast to (batch, heads, length, length); False where masked.
            train: whether dropout is active.
        """
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        y = Attention(heads=self.heads, name='attention', **dtypes)(x, mask)
        x = _norm('attention_norm', **dtypes)(x + dropout(y))
        y = _dense(self.mlp_width, 'mlp_in', ('embed', 'mlp'), **dtypes)(x)
        y = nn.gelu(y, approximate=False)  # As in the pretrained weights.
        y = _dense(x.shape[-1], 'mlp_out', ('mlp', 'embed'), **dtypes)(y)
        return _norm('mlp_norm', **dtypes)(x + dropout(y))


class Encoder(nn.Module):
    """Encodes each token as a vector; the defaults are those of BERT base.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        layers: number of layers.
        width: size of the vectors.
        heads: number of attention heads; must divide the width.
        mlp_width: hidden units of each MLP; by default 4 x width.
        max_length: maximum length of a sequence: number of position embeddings.
        token_types: number of token types, such as first and second sentence.
        dropout_rate: dropout of the embeddings and of each branch in training.
        dtype: dtype of the computation, such as bfloat16; None follows the parameters.
        param_dtype: dtype of the parameters.
    """

    vocab_size: int = 30522
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int | None = None
    max_length: int = 512
    token_types: int = 2
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        train: bool = False,
        *,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """Returns (batch, length, width) for integer tokens (batch, length).

        Args:
            tokens: padded at the end to the same length.
            train: whether dropout is active.
            mask: bool (batch, length), False for padding; by default there is no padding.
            token_types: int (batch, length); by default all are 0.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f'{length} tokens, but max_length is {self.max_length}')
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def embed(name: str, size: int, indices: jax.Array, axis: str) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, 'embed'))
            return nn.Embed(size, self.width, embedding_init=init, name=name, **dtypes)(indices)

        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = embed('word', self.vocab_size, tokens, 'vocab')
        x = x + embed('position', self.max_length, jnp.arange(length), 'length')
        x = _norm('norm', **dtypes)(x + embed('token_type', self.token_types, types, 'types'))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)

        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        for layer in range(self.layers):
            x = Layer(
                heads=self.heads,
                mlp_width=self.mlp_width or 4 * self.width,
                dropout_rate=self.dropout_rate,
                name=f'layer_{layer}',
                **dtypes,
            )(x, mask[:, None, None, :], train)  # Of the keys: padding queries are unused.
        return x


class SentenceEncoder(nn.Module):
    """Embeds a text as the normalized mean of an encoder's vectors.

    Attributes:
        encoder: the `Encoder` that reads the tokens.
        normalize: whether to scale the mean to norm 1.
        pad_token: id of the padding token.
    """

    encoder: nn.Module
    normalize: bool = True
    pad_token: int = 0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Returns (batch, width) for integer tokens (batch, length)."""
        mean = _mean(self.encoder, tokens, tokens != self.pad_token, train)
        norm = jnp.linalg.norm(mean, axis=-1, keepdims=True) if self.normalize else 1.0
        return mean / jnp.maximum(norm, 1e-12)


class TextClassifier(nn.Module):
    """Classifies a text by the mean of an encoder's vectors.

    Attributes:
        encoder: an `Encoder`; the head has the same dtypes.
        num_classes: number of logits.
        dropout_rate: dropout of the mean in training.
        pad_token: id of the padding token.
    """

    encoder: nn.Module
    num_classes: int = 2
    dropout_rate: float = 0.0
    pad_token: int = 0

    def setup(self) -> None:
        """Creates dropout and head."""
        self.dropout = nn.Dropout(self.dropout_rate)
        self.head = nn.Dense(
            self.num_classes,
            dtype=getattr(self.encoder, 'dtype', None),
            param_dtype=getattr(self.encoder, 'param_dtype', jnp.float32),
        )

    def features(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Returns the input of the head (batch, width), which is constant for a frozen encoder."""
        return _mean(self.encoder, tokens, tokens != self.pad_token, train)

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (batch, num_classes) for integer tokens (batch, length)."""
        x = self.dropout(self.features(tokens, train), deterministic=not train)
        return self.head(x)


def _mean(encoder: nn.Module, tokens: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    x = encoder(tokens, train, mask=mask)
    weights = mask[:, :, None].astype(x.dtype)
    # At least 1: an empty text has the mean 0, not NaN.
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def _dense(features: int, name: str, axes: tuple[str, str], **dtypes: Any) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return nn.Dense(features, kernel_init=init, name=name, **dtypes)
