# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer language model with named dimensions, written with NNX.

A suffix of a name says which dimensions an array has:

    B  sequences of a batch       N  attention heads
    L  tokens of a sequence       K  units of a head, D / N
    D  width of the model         M  hidden units of the MLP
    V  tokens of the vocabulary
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


def rotate(x_BLNK: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates queries or keys by angles proportional to their positions (Su et al., 2021).

    The product of a query and a key then depends on the distance between their positions only.

    Args:
        x_BLNK: with an even number of units.
        positions: int (batch, length) or (1, length).

    Returns:
        An array of the shape and dtype of x_BLNK.
    """
    half = x_BLNK.shape[-1] // 2
    frequencies = 10_000.0 ** -(jnp.arange(half) / half)
    angles = (positions[..., None] * frequencies)[:, :, None]
    # In float32: half precision cannot tell large positions apart.
    a, b = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BLNK.dtype)


def _with_axes(init: Any, *axes: str) -> Any:
    # Not eager: NNX would look for mesh axes of these names.
    return nnx.with_partitioning(init, axes, eager_sharding=False)


def _linear(sizes: tuple[int, int], axes: tuple[str, str], **options: Any) -> nnx.Linear:
    init = _with_axes(nnx.initializers.lecun_normal(), *axes)
    return nnx.Linear(*sizes, kernel_init=init, **options)


def _layer_norm(width: int, **options: Any) -> nnx.LayerNorm:
    scale = _with_axes(nnx.initializers.ones, 'embed')
    bias = _with_axes(nnx.initializers.zeros, 'embed')
    return nnx.LayerNorm(width, scale_init=scale, bias_init=bias, **options)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, rotary: bool, rngs: nnx.Rngs, **dtypes: Any):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of heads; must divide the width.
            rotary: whether queries and keys are rotated by their positions.
            rngs: random keys of the initial parameters.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        self.heads = heads
        self.rotary = rotary
        options = dict(rngs=rngs, **dtypes)
        self.query = _linear((width, width), ('embed', 'heads'), **options)
        self.key = _linear((width, width), ('embed', 'heads'), **options)
        self.value = _linear((width, width), ('embed', 'heads'), **options)
        self.out = _linear((width, width), ('heads', 'embed'), **options)

    def __call__(self, x_BLD: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input; for the rest see `Block`."""
        batch, length, width = x_BLD.shape
        shape = (batch, length, self.heads, width // self.heads)
        q_BLNK, k_BLNK, v_BLNK = (
            layer(x_BLD).reshape(shape) for layer in (self.query, self.key, self.value)
        )
        if self.rotary:
            q_BLNK, k_BLNK = rotate(q_BLNK, positions), rotate(k_BLNK, positions)
        scores_BNLL = jnp.einsum('BLNK,BSNK->BNLS', q_BLNK * shape[-1] ** -0.5, k_BLNK)
        # In float32: half-precision weights would not sum to 1.
        scores_BNLL = jnp.where(mask, scores_BNLL.astype(jnp.float32), -1e30)
        weights_BNLL = jax.nn.softmax(scores_BNLL).astype(v_BLNK.dtype)
        y_BLNK = jnp.einsum('BNLS,BSNK->BLNK', weights_BNLL, v_BLNK)
        return self.out(y_BLNK.reshape(x_BLD.shape))


class Block(nnx.Module):
    """Attention and an MLP, each normalized first and added to its input."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        dropout_rate: float,
        *,
        rotary: bool,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Creates the parameters.

        Args:
            width: features of a token.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of the MLP.
            dropout_rate: probability of dropping an element of each branch's output in training.
            rotary: see `Attention`.
            rngs: random keys of the initial parameters and of dropout.
            **dtypes: `dtype` and `param_dtype` of the layers.
        """
        options = dict(rngs=rngs, **dtypes)
        self.attention_norm = _layer_norm(width, **options)
        self.attention = Attention(width, heads, rotary=rotary, **options)
        self.mlp_norm = _layer_norm(width, **options)
        self.mlp_in = _linear((width, mlp_width), ('embed', 'mlp'), **options)
        self.mlp_out = _linear((mlp_width, width), ('mlp', 'embed'), **options)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns an array of the shape of the input.

        Args:
            x_BLD: the input.
            mask: bool, broadcast to (batch, heads, length, length); False where masked.
            positions: int (batch, length) or (1, length), the position of each token in its
                sequence.
        """
        y_BLD = self.attention(self.attention_norm(x_BLD), mask, positions)
        x_BLD = x_BLD + self.dropout(y_BLD)
        y_BLM = nnx.gelu(self.mlp_in(self.mlp_norm(x_BLD)))
        return x_BLD + self.dropout(self.mlp_out(y_BLM))


class Transformer(nnx.Module):
    """Predicts the next token at every position, as `trainer.models.transformer` does.

    Its parameters have the names that they have there, except that `block_0` is `blocks/0`. It has
    neither a cache for decoding nor a scan over the layers.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        layers: int = 4,
        width: int = 256,
        heads: int = 4,
        mlp_width: int | None = None,
        max_length: int = 1024,
        positions: Literal['learned', 'rotary'] = 'learned',
        tied: bool = False,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            vocab_size: number of tokens in the vocabulary.
            layers: number of blocks.
            width: width of the residual stream.
            heads: number of attention heads; must divide the width.
            mlp_width: hidden units of each MLP; by default 4 x width.
            max_length: maximum length of a sequence.
            positions: 'learned' for a table of position embeddings, or 'rotary' for queries and
                keys that are rotated: see `rotate`.
            tied: whether the logits are products with the embeddings of the tokens, instead of a
                layer of their own.
            dropout_rate: dropout of the embeddings and of each branch in training.
            dtype: dtype of the computation, such as bfloat16; None follows the parameters.
            param_dtype: dtype of the parameters.
            rngs: random keys of the initial parameters and of dropout.

        Raises:
            ValueError: for invalid options.
        """
        _check_options(width, heads, positions)
        self.max_length = max_length
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        embedding = _with_axes(normal, 'vocab', 'embed')
        self.tokens = nnx.Embed(vocab_size, width, embedding_init=embedding, **options)
        # `nnx.Embed` turns None into the dtype of its parameters now, whatever they are cast to.
        self.tokens.dtype = dtype
        table = _with_axes(normal, 'length', 'embed')
        self.positions = (
            nnx.Param(table(rngs.params(), (max_length, width), param_dtype))
            if positions == 'learned'
            else None
        )
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        sizes = (width, heads, mlp_width or 4 * width, dropout_rate)
        rotary = positions == 'rotary'
        # `nnx.List`, because NNX does not look for modules in a Python list.
        self.blocks = nnx.List([Block(*sizes, rotary=rotary, **options) for _ in range(layers)])
        self.norm = _layer_norm(width, **options)
        self.logits = None if tied else _linear((width, vocab_size), ('embed', 'vocab'), **options)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits (batch, length, vocab_size) for integer tokens (batch, length).

        Args:
            tokens: one sequence per example, or several packed ones.
            segments: int (batch, length), the index of each token's sequence; attention is
                restricted to the same sequence.
            positions: int (batch, length), the position of each token in its sequence; by default
                its position in the example.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f'{length} tokens, but max_length is {self.max_length}')
        if positions is None:
            positions = jnp.arange(length)[None]
        x_BLD = self.tokens(tokens)
        if self.positions is not None:
            x_BLD = x_BLD + self.positions[...][positions].astype(x_BLD.dtype)
        x_BLD = self.dropout(x_BLD)
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        for block in self.blocks:
            x_BLD = block(x_BLD, mask, positions)
        x_BLD = self.norm(x_BLD)
        return self.tokens.attend(x_BLD) if self.logits is None else self.logits(x_BLD)


def _check_options(width: int, heads: int, positions: str) -> None:
    """Raises ValueError for invalid options of `Transformer`."""
    if heads < 1 or width % heads:
        raise ValueError(f'heads={heads} does not divide width={width}')
    if positions not in ('learned', 'rotary'):
        raise ValueError(f'positions: {positions!r} is none of learned, rotary')
    if positions == 'rotary' and width // heads % 2:
        raise ValueError(
            f'width={width}, heads={heads}: rotary positions need an even number of features per '
            'head'
        )
