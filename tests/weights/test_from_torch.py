# SPDX-License-Identifier: Apache-2.0
"""Converted layers and networks of PyTorch give the same outputs."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.examples import assert_same, trainer
from tests.weights.networks import NAMES, Flat, ResNet, ViT
from trainer.config.errors import UserError
from trainer.weights import restore, safetensors

torch = pytest.importorskip('torch')
from tests.weights import torch_networks  # noqa: E402

F = torch.nn


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype('f4')


def first(x: np.ndarray) -> Any:
    """Channels before height and width, as in PyTorch."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x: Any) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def scramble(module: Any) -> Any:
    """Returns the module in evaluation mode, with random parameters and statistics."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.dtype.is_floating_point and x.ndim <= 1:
                low = 0.5 if name.endswith(('running_var', 'weight')) else -0.5
                x.copy_(torch.rand(x.shape) + low)
    return module.eval()


def close(mine: Any, theirs: np.ndarray) -> None:
    """Within 1e-5 of the largest value."""
    mine = np.asarray(mine)
    assert mine.shape == theirs.shape
    assert abs(mine - theirs).max() <= 1e-5 * abs(theirs).max()


def convert(flax_module: nn.Module, torch_module: Any, x: Any, **options: Any) -> Any:
    """Returns the Flax module as a function with the values of the other one."""
    variables = flax_module.init(jax.random.key(0), x)
    loaded = restore.torch_variables(torch_module.state_dict(), variables, **options)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    return flax_module.apply(loaded, x)


class Inner(nn.Module):
    """Gives a layer a name, as the containers of PyTorch do."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def inner(layer: Any) -> Any:
    return scramble(F.ModuleDict({'layer': layer}))


@pytest.mark.parametrize(
    ('mine', 'theirs', 'shape'),
    [
        (nn.Dense(4), lambda: F.Linear(4, 4), (2, 5, 4)),
        (nn.Dense(3, use_bias=False), lambda: F.Linear(4, 3, bias=False), (2, 4)),
        (nn.LayerNorm(epsilon=1e-5), lambda: F.LayerNorm(6), (2, 3, 6)),
        (nn.PReLU(), lambda: F.PReLU(init=0.3), (2, 3, 6)),
    ],
)
def test_layers_with_the_channels_last(mine: Any, theirs: Any, shape: Any) -> None:
    """A linear layer's weight is transposed, square or not."""
    x, layer = random_array(*shape), inner(theirs())
    close(convert(Inner(mine), layer, x), layer['layer'](torch.from_numpy(x)).detach().numpy())


@pytest.mark.parametrize(
    ('mine', 'theirs', 'shape'),
    [
        (nn.Conv(4, (2, 3), padding='VALID'), lambda: F.Conv2d(3, 4, (2, 3)), (1, 6, 7, 3)),
        (nn.Conv(4, (3, 3), strides=2, padding=1), lambda: F.Conv2d(4, 4, 3, 2, 1), (1, 6, 6, 4)),
        (nn.Conv(6, (3, 3), padding=1, feature_group_count=2),
         lambda: F.Conv2d(4, 6, 3, 1, 1, groups=2), (2, 5, 5, 4)),
        (nn.Conv(5, (3,), padding='VALID'), lambda: F.Conv1d(3, 5, 3), (2, 7, 3)),
        (nn.Conv(2, (2, 2, 2), padding='VALID'), lambda: F.Conv3d(3, 2, 2), (1, 3, 4, 5, 3)),
        (nn.ConvTranspose(5, (3, 3), strides=(2, 2), padding='VALID', transpose_kernel=True),
         lambda: F.ConvTranspose2d(4, 5, 3, 2), (1, 4, 5, 4)),
        (nn.ConvTranspose(5, (3, 3), strides=(2, 2), padding=((1, 2), (1, 2)),
                          transpose_kernel=True),
         lambda: F.ConvTranspose2d(4, 5, 3, 2, padding=1, output_padding=1), (1, 4, 5, 4)),
        (nn.BatchNorm(use_running_average=True), lambda: F.BatchNorm2d(3), (2, 4, 4, 3)),
        (nn.GroupNorm(2, epsilon=1e-5), lambda: F.GroupNorm(2, 6), (2, 3, 3, 6)),
    ],
)  # fmt: skip
def test_layers_with_the_channels_first(mine: Any, theirs: Any, shape: Any) -> None:
    """Kernels, running statistics, and a transposed convolution."""
    x, layer = random_array(*shape), inner(theirs())
    close(convert(Inner(mine), layer, x), last(layer['layer'](first(x))))


def test_momentum_of_batch_norm() -> None:
    """PyTorch's 0.1 is Flax's 0.9, and a training batch moves the mean equally (PyTorch's
    variance is that of a sample)."""
    x, layer = random_array(4, 3, 3, 2), inner(F.BatchNorm2d(2, momentum=0.1))
    mine = Inner(nn.BatchNorm(use_running_average=False, momentum=0.9))
    variables = mine.init(jax.random.key(0), x)
    loaded = restore.torch_variables(layer.state_dict(), variables)
    y, changed = mine.apply(loaded, x, mutable=['batch_stats'])
    close(y, last(layer.train()['layer'](first(x))))
    close(changed['batch_stats']['layer']['mean'], layer['layer'].running_mean.numpy())


def test_pooling() -> None:
    """`count_include_pad`, and the maximum."""
    x, pads = random_array(2, 6, 6, 3), ((1, 1), (1, 1))
    for count in (True, False):
        theirs = F.AvgPool2d(3, 2, 1, count_include_pad=count)(first(x))
        mine = nn.avg_pool(x, (3, 3), (2, 2), pads, count_include_pad=count)
        close(mine, last(theirs))
    close(nn.max_pool(x, (3, 3), (2, 2), pads), last(F.MaxPool2d(3, 2, 1)(first(x))))


def test_embedding() -> None:
    """Not transposed, square or not."""
    tokens = np.array([[1, 2], [3, 0]])
    layer = inner(F.Embedding(4, 4))
    close(convert(Inner(nn.Embed(4, 4)), layer, tokens),
          layer['layer'](torch.from_numpy(tokens)).detach().numpy())  # fmt: skip


def test_attention() -> None:
    """PyTorch's three projections are one tensor, Flax's kernels have a dimension of heads."""
    x = random_array(2, 5, 12)
    layer = inner(F.MultiheadAttention(12, 3, batch_first=True))
    mine = nn.MultiHeadDotProductAttention(num_heads=3)
    query = torch.from_numpy(x)
    close(convert(Inner(mine), layer, x), layer['layer'](query, query, query)[0].detach().numpy())


class Cross(nn.Module):
    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(3, qkv_features=12, name='layer')(query, key, value)


def test_attention_to_other_widths() -> None:
    """PyTorch then has a tensor for each projection."""
    inputs = random_array(2, 5, 12), random_array(2, 4, 7, seed=1), random_array(2, 4, 9, seed=2)
    theirs = inner(F.MultiheadAttention(12, 3, kdim=7, vdim=9, batch_first=True))
    mine = Cross()
    loaded = restore.torch_variables(theirs.state_dict(), mine.init(jax.random.key(0), *inputs))
    expected = theirs['layer'](*map(torch.from_numpy, inputs))[0]
    close(mine.apply(loaded, *inputs), expected.detach().numpy())


@pytest.mark.parametrize('height', [1, 6])
def test_flatten_order(height: int) -> None:
    """The dense layer's rows are reordered for Flax: the model needs no transpose."""
    theirs = scramble(torch_networks.Flat(height))
    x = random_array(2, height, 4, 3)
    flatten = (('fc', (5, height, 4)),)
    close(convert(Flat(), theirs, x, flatten=flatten), theirs(first(x)).detach().numpy())
    if height > 1:
        wrong = convert(Flat(), theirs, x)
        assert abs(wrong - theirs(first(x)).detach().numpy()).max() > 0.01


@pytest.mark.parametrize(
    ('pattern', 'sizes', 'message'),
    [
        ('fc', (5, 6, 2), r'^flatten: fc has 120 inputs, which does not fit \(5, 6, 2\)'),
        ('fc', (5, 7, 4), r'^flatten: fc has 120 inputs, which does not fit \(5, 7, 4\)'),
        ('fc', (5, 24), r'which does not fit \(5, 24\)\. Expected the \(channels, height'),
        ('fc', (-5, -6, 4), r'which does not fit \(-5, -6, 4\)'),
        ('fc8', (5, 6, 4), r"the pattern 'fc8' matches no dense layer.* such as fc$"),
        ('.*', (5, 6, 4), r'conv is not a dense layer: its kernel has shape \[1, 1, 3, 5\]'),
    ],
)
def test_a_wrong_flattening_is_refused(pattern: str, sizes: Any, message: str) -> None:
    """Neither a wrong size nor a pattern without a match passes silently."""
    with pytest.raises(UserError, match=message):
        flatten = ((pattern, sizes),)
        convert(Flat(), torch_networks.Flat(6), random_array(2, 6, 4, 3), flatten=flatten)


def test_resnet_18(tmp_path: pathlib.Path) -> None:
    """With a map of names, from Python and by `config.init_from`."""
    theirs = scramble(torch_networks.ResNet())
    x = random_array(2, 64, 64, 3)
    expected = theirs(first(x)).detach().numpy()
    mine = ResNet()
    close(convert(mine, theirs, x, rename=NAMES), expected)
    variables = mine.init(jax.random.key(0), x)
    assert sum(p.size for p in jax.tree.leaves(variables['params'])) == sum(
        p.numel() for p in theirs.parameters()
    )
    loaded = restore.torch_variables(theirs.state_dict(), variables, rename=NAMES)
    file, tensors = tmp_path / 'resnet.pt', tmp_path / 'resnet.safetensors'
    torch.save(theirs.state_dict(), file)
    safetensors.write(tensors, {n: t.numpy() for n, t in theirs.state_dict().items()})
    for path in (file, tensors):
        run = trainer(
            tmp_path, model={'target': 'tests.weights.networks:ResNet'},
            data__source={'target': 'tests.weights.networks:Images'},
            init_from={'path': str(path), 'layout': 'torch', 'rename': NAMES},
        )  # fmt: skip
        assert_same(run.init_state().variables, loaded)


@pytest.mark.parametrize('norm_first', [True, False])
def test_a_transformer_encoder_layer(norm_first: bool) -> None:
    """Attention, norms and MLP of `torch.nn.TransformerEncoderLayer`."""
    theirs = scramble(torch_networks.encoder_layer(norm_first))
    x = random_array(2, 7, 16)
    expected = theirs(torch.from_numpy(x)).detach().numpy()
    close(convert(ViT(norm_first), theirs, x), expected)


def test_mismatches_are_listed() -> None:
    """The message lists tensors and arrays; an incomplete map of names is refused."""
    theirs = scramble(torch_networks.ResNet())
    x = random_array(1, 32, 32, 3)
    with pytest.raises(UserError) as caught:
        convert(ResNet(), theirs, x, rename=NAMES[:1])
    assert 'the state_dict does not fit the model.\nMissing:\n' in str(caught.value)
    assert 'layer2_0/downsample_conv/kernel' in str(caught.value)
    # A name of the message is one that `rename` takes, and it speaks of no config.
    assert '\nNot in the model:\n  layer2_0/downsample/0/weight\n' in str(caught.value)
    assert 'config' not in str(caught.value)
    with pytest.raises(
        UserError, match=r'fc/kernel: got float32\[512, 10\], the model has float32\[512, 7\]'
    ):
        convert(ResNet(classes=7), theirs, x, rename=NAMES)


def test_files_with_more_than_tensors(tmp_path: pathlib.Path) -> None:
    """Checkpoints of training scripts, under any file name; a pickled module is refused,
    because unpickling could run any code."""
    net = inner(F.Linear(3, 2))
    optimizer = torch.optim.Adam(net.parameters())
    weights = {name: x.numpy() for name, x in net.state_dict().items()}
    rest = {'optimizer': optimizer.state_dict(), 'epoch': 3, 'name': 'net'}
    torch.save({'model': net.state_dict(), **rest}, tmp_path / 'net.ckpt')
    torch.save({'state_dict': net.state_dict(), **rest}, tmp_path / 'lightning.tar')
    for name, at in (('net.ckpt', 'model'), ('lightning.tar', '')):
        raw = restore.raw(tmp_path / name, at=at)
        np.testing.assert_array_equal(raw['layer']['weight'], weights['layer.weight'])
        assert set(raw) == {'layer'}
    torch.save(net, tmp_path / 'module.pt')
    with pytest.raises(UserError, match=r'module\.pt contains objects other than tensors'):
        restore.raw(tmp_path / 'module.pt')
    (tmp_path / 'torn.pt').write_bytes((tmp_path / 'net.ckpt').read_bytes()[:500])
    with pytest.raises(UserError, match=r'PyTorch cannot read .*torn\.pt: RuntimeError'):
        restore.raw(tmp_path / 'torn.pt')
    torch.save({'epoch': 3}, tmp_path / 'empty.pt')
    with pytest.raises(UserError, match=r'empty\.pt contains no named tensors'):
        restore.raw(tmp_path / 'empty.pt')


def test_arguments_are_checked() -> None:
    """Numpy arrays are accepted; a module or an incomplete pair is refused."""
    layer, mine = inner(F.Linear(3, 2)), Inner(nn.Dense(2))
    variables = mine.init(jax.random.key(0), jnp.ones((1, 3)))
    arrays = {name: x.numpy() for name, x in layer.state_dict().items()}
    expected = restore.torch_variables(layer.state_dict(), variables)
    assert_same(restore.torch_variables(arrays, variables), expected)
    with pytest.raises(UserError, match=r'model\.state_dict\(\); got a ModuleDict'):
        restore.torch_variables(layer, variables)
    pair: Any = ('^layer/', 'x/')
    with pytest.raises(
        UserError, match=r"^rename: expected \(pattern, replacement\) pairs, got '\^"
    ):
        restore.torch_variables(arrays, variables, rename=pair)


def test_legacy_files(tmp_path: pathlib.Path) -> None:
    """Recognized under any name."""
    net = inner(F.Linear(3, 2))
    torch.save(net.state_dict(), tmp_path / 'old.ckpt', _use_new_zipfile_serialization=False)
    weight = net.state_dict()['layer.weight'].numpy()
    np.testing.assert_array_equal(restore.raw(tmp_path / 'old.ckpt')['layer']['weight'], weight)


def test_bfloat16_tensors() -> None:
    """They become float32, because numpy has no bfloat16."""
    layer = inner(F.Linear(3, 2)).to(torch.bfloat16)
    loaded = restore.torch_variables(
        layer.state_dict(), Inner(nn.Dense(2)).init(jax.random.key(0), jnp.ones((1, 3)))
    )
    np.testing.assert_array_equal(
        loaded['params']['layer']['kernel'], layer['layer'].weight.detach().float().numpy().T
    )
