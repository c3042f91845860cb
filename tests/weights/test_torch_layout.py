# SPDX-License-Identifier: Apache-2.0
"""PyTorch's layout without PyTorch: weights are converted and compared with layers in numpy."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import meta

from tests.weights import numpy_layers as layers
from tests.weights.examples import assert_same, trainer
from tests.weights.networks import ViT
from trainer.config.errors import UserError
from trainer.models.bert import HUGGING_FACE, Encoder, SentenceEncoder
from trainer.weights import restore, safetensors

AT = 'layer.'


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype('f4')


def weights(shapes: dict[str, tuple[int, ...]], at: str = AT) -> dict[str, np.ndarray]:
    """Returns a state_dict with random values; scales and variances are positive."""
    arrays = {}
    for seed, (name, shape) in enumerate(shapes.items(), start=1):
        values = np.asarray(0.5 * random_array(*shape, seed=seed))
        of_norm = len(shape) == 1 and name.endswith(('weight', 'running_var'))
        arrays[at + name] = abs(values) + np.float32(0.5) if of_norm else values
    return arrays


def norm(features: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(('weight', 'bias'), (features,))


def batch_norm(features: int) -> dict[str, tuple[int, ...]]:
    names = ('weight', 'bias', 'running_mean', 'running_var')
    return {**dict.fromkeys(names, (features,)), 'num_batches_tracked': ()}


def linear(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {'weight': (outputs, inputs), 'bias': (outputs,)}


def nest(**parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module with submodules; '__' means '.'."""
    return {
        f'{at.replace("__", ".")}.{name}': shape
        for at, shapes in parts.items()
        for name, shape in shapes.items()
    }


def close(mine: Any, theirs: np.ndarray) -> None:
    """Within 1e-5 of the largest value."""
    assert mine.shape == theirs.shape
    assert abs(np.asarray(mine) - theirs).max() <= 1e-5 * abs(theirs).max()


def last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1)


def convert(module: nn.Module, tensors: dict[str, np.ndarray], x: Any, **options: Any) -> Any:
    """Returns the output of the Flax module for `x` with those weights."""
    variables = module.init(jax.random.key(0), x)
    loaded = restore.torch_variables(tensors, variables, **options)
    assert jax.tree.structure(loaded) == jax.tree.structure(meta.unbox(variables))
    return module.apply(loaded, x)


class Inner(nn.Module):
    """Gives a layer a name, as the containers of PyTorch do."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


@pytest.mark.parametrize(
    ('mine', 'shapes', 'theirs', 'x'),
    [
        (nn.Dense(4), linear(4, 4), layers.linear, random_array(2, 5, 4)),
        (nn.Dense(3, use_bias=False), {'weight': (3, 4)}, layers.linear, random_array(2, 4)),
        (nn.LayerNorm(epsilon=1e-5), norm(6), layers.layer_norm, random_array(2, 3, 6)),
        (nn.Embed(4, 4), {'weight': (4, 4)}, layers.embedding, np.array([[1, 2], [3, 0]])),
        (nn.MultiHeadDotProductAttention(3),
         {'in_proj_weight': (36, 12), 'in_proj_bias': (36,), **nest(out_proj=linear(12, 12))},
         lambda x, w, at: layers.self_attention(x, w, at, heads=3), random_array(2, 5, 12)),
    ],
    ids=['linear', 'no bias', 'layer norm', 'embedding', 'attention'],
)  # fmt: skip
def test_layers_with_the_channels_last(
    mine: nn.Module, shapes: Any, theirs: Callable[..., np.ndarray], x: np.ndarray
) -> None:
    """A square matrix is transposed if it is a kernel, but not if it is an embedding."""
    tensors = weights(shapes)
    close(convert(Inner(mine), tensors, x), theirs(x, tensors, AT))


@pytest.mark.parametrize(
    ('mine', 'shapes', 'theirs', 'shape'),
    [
        (nn.Conv(4, (2, 3), padding='VALID'), {'weight': (4, 3, 2, 3), 'bias': (4,)},
         layers.conv2d, (1, 6, 7, 3)),
        (nn.Conv(4, (3, 3), strides=2, padding=1), {'weight': (4, 4, 3, 3), 'bias': (4,)},
         lambda *args: layers.conv2d(*args, stride=2, padding=1), (1, 6, 6, 4)),
        (nn.Conv(6, (3, 3), padding=1, feature_group_count=2, use_bias=False),
         {'weight': (6, 2, 3, 3)}, lambda *args: layers.conv2d(*args, padding=1, groups=2),
         (2, 5, 5, 4)),
        (nn.ConvTranspose(5, (3, 3), strides=(2, 2), padding='VALID', transpose_kernel=True),
         {'weight': (4, 5, 3, 3), 'bias': (5,)},
         lambda *args: layers.conv_transpose2d(*args, stride=2), (1, 4, 5, 4)),
        (nn.BatchNorm(use_running_average=True), batch_norm(3), layers.batch_norm, (2, 4, 4, 3)),
    ],
    ids=['window', 'stride', 'groups', 'transposed', 'batch norm'],
)  # fmt: skip
def test_layers_with_the_channels_first(
    mine: nn.Module, shapes: Any, theirs: Callable[..., np.ndarray], shape: tuple[int, ...]
) -> None:
    """Kernels, and running statistics."""
    x, tensors = random_array(*shape), weights(shapes)
    close(convert(Inner(mine), tensors, x), last(theirs(first(x), tensors, AT)))


@pytest.mark.parametrize('count', [True, False])
def test_pooling(count: bool) -> None:
    """`count_include_pad`, and the maximum."""
    x, pads = random_array(2, 6, 6, 3), ((1, 1), (1, 1))
    theirs = layers.avg_pool2d(first(x), 3, stride=2, padding=1, count_include_pad=count)
    close(nn.avg_pool(x, (3, 3), (2, 2), pads, count_include_pad=count), last(theirs))
    theirs = layers.max_pool2d(first(x), 3, stride=2, padding=1)
    close(nn.max_pool(x, (3, 3), (2, 2), pads), last(theirs))


class Network(nn.Module):
    """A convolution, its norm and a pooling, flattened for a dense layer in the order of Flax."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(5, (3, 3), strides=2, padding=1, name='features_0')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name='features_1')(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(2, name='fc')(x.reshape(len(x), -1))


NETWORK = weights(
    nest(
        features__0={'weight': (5, 3, 3, 3), 'bias': (5,)},
        features__1=batch_norm(5),
        fc=linear(5 * 8 * 8, 2),
    ),
    at='',
)
NAMES = (('^features/', 'features_'),)
FLATTEN = (('fc', (5, 8, 8)),)


def network(x: np.ndarray) -> np.ndarray:
    """The same by PyTorch's rules: flattened with the channels first."""
    y = layers.conv2d(first(x), NETWORK, 'features.0.', stride=2, padding=1)
    y = layers.relu(layers.batch_norm(y, NETWORK, 'features.1.'))
    y = layers.avg_pool2d(y, 2, stride=2, padding=0, count_include_pad=True)
    return layers.linear(y.reshape(len(y), -1), NETWORK, 'fc.')


def test_a_network_that_flattens(tmp_path: pathlib.Path) -> None:
    """From Python, and by `config.init_from` from a file; the order of rows is the model's."""
    x = random_array(2, 32, 32, 3)
    expected, mine = network(x), Network()
    close(convert(mine, NETWORK, x, rename=NAMES, flatten=FLATTEN), expected)
    wrong = convert(mine, NETWORK, x, rename=NAMES)
    assert abs(wrong - expected).max() > 0.1 * abs(expected).max()
    file = tmp_path / 'network.safetensors'
    safetensors.write(file, NETWORK)
    run = trainer(
        tmp_path, model={'target': f'{__name__}:Network'},
        data__source={'target': 'tests.weights.networks:Images'},
        init_from={'path': str(file), 'layout': 'torch', 'rename': NAMES, 'flatten': FLATTEN},
    )  # fmt: skip
    variables = jax.device_get(run.init_state().variables)
    loaded = restore.torch_variables(
        NETWORK, mine.init(jax.random.key(0), x), rename=NAMES, flatten=FLATTEN
    )
    assert_same(variables, loaded)
    close(mine.apply(variables, x), expected)


def test_an_incomplete_map_of_names_is_refused() -> None:
    x = random_array(2, 32, 32, 3)
    with pytest.raises(UserError, match='the state_dict does not fit the model') as caught:
        convert(Network(), NETWORK, x, flatten=FLATTEN)
    assert 'features_0/kernel' in str(caught.value)


@pytest.mark.slow
def test_a_transformer_encoder_layer() -> None:
    """The names of `torch.nn.TransformerEncoderLayer`, norms before the branches."""
    shapes = nest(
        self_attn={'in_proj_weight': (48, 16), 'in_proj_bias': (48,)},
        self_attn__out_proj=linear(16, 16),
        linear1=linear(16, 32), linear2=linear(32, 16), norm1=norm(16), norm2=norm(16),
    )  # fmt: skip
    x, w = random_array(2, 7, 16), weights(shapes, at='')
    y = x + layers.self_attention(layers.layer_norm(x, w, 'norm1.'), w, 'self_attn.', heads=4)
    hidden = layers.gelu(layers.linear(layers.layer_norm(y, w, 'norm2.'), w, 'linear1.'))
    close(convert(ViT(), w, x), y + layers.linear(hidden, w, 'linear2.'))


def bert(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of Hugging Face's BERT, by name."""
    width, inner = shape['width'], shape['mlp_width']
    tables = {'word': shape['vocab_size'], 'position': shape['max_length'], 'token_type': 2}
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        f'embeddings__{name}_embeddings': {'weight': (size, width)} for name, size in tables.items()
    }
    parts['embeddings__LayerNorm'] = norm(width)
    for number in range(shape['layers']):
        at = f'encoder__layer__{number}__'
        for name in ('self__query', 'self__key', 'self__value', 'output__dense'):
            parts[f'{at}attention__{name}'] = linear(width, width)
        parts[f'{at}attention__output__LayerNorm'] = parts[f'{at}output__LayerNorm'] = norm(width)
        parts[f'{at}intermediate__dense'] = linear(width, inner)
        parts[f'{at}output__dense'] = linear(inner, width)
    return nest(**parts)


def sentence(tokens: np.ndarray, w: layers.Weights, sizes: dict[str, int]) -> np.ndarray:
    """BERT, norms after the residual connections, and the mean without padding."""
    mask, eps = tokens != 0, 1e-12
    x = layers.embedding(tokens, w, 'embeddings.word_embeddings.')
    x = x + w['embeddings.position_embeddings.weight'][: tokens.shape[1]]
    x = x + w['embeddings.token_type_embeddings.weight'][0]
    x = layers.layer_norm(x, w, 'embeddings.LayerNorm.', eps=eps)
    for number in range(sizes['layers']):
        at = f'encoder.layer.{number}.'
        names = (f'{at}attention.self.{name}.' for name in ('query', 'key', 'value'))
        query, key, value = (layers.linear(x, w, name) for name in names)
        y = layers.attend(query, key, value, sizes['heads'], mask)
        y = x + layers.linear(y, w, f'{at}attention.output.dense.')
        y = layers.layer_norm(y, w, f'{at}attention.output.LayerNorm.', eps=eps)
        hidden = layers.gelu(layers.linear(y, w, f'{at}intermediate.dense.'))
        x = y + layers.linear(hidden, w, f'{at}output.dense.')
        x = layers.layer_norm(x, w, f'{at}output.LayerNorm.', eps=eps)
    mean = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


@pytest.mark.slow
def test_a_sentence_encoder() -> None:
    """The names of Hugging Face's BERT, in small; padding is ignored."""
    sizes = dict(vocab_size=20, layers=2, width=12, heads=3, mlp_width=24, max_length=10)
    tensors = weights(bert(sizes), at='')
    tokens = np.random.default_rng(0).integers(1, 20, (3, 8))
    tokens[0, 5:] = tokens[2, 2:] = 0
    found = convert(
        SentenceEncoder(Encoder(**sizes)),
        tensors,
        tokens,
        rename=(*HUGGING_FACE, ('^', 'encoder/')),
    )
    close(found, sentence(tokens, tensors, sizes))
