# SPDX-License-Identifier: Apache-2.0
"""Residual networks: names, sizes, statistics, and weights of PyTorch."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from tests.command import ROOT
from trainer.experiment import load_and_build
from trainer.models.resnet import TORCHVISION, ResNet
from trainer.trainer import Trainer
from trainer.weights import restore

X = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype('f4')
SMALL = ResNet(stages=(1, 1), features=8, stem='small', num_classes=10)


def shapes(model: ResNet) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))


def size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def test_parameter_counts() -> None:
    """The numbers of parameters that torchvision states for ResNet-18 and ResNet-50."""
    assert size(shapes(ResNet(stages=(2, 2, 2, 2)))['params']) == 11_689_512
    deep = ResNet(stages=(3, 4, 6, 3), block='bottleneck')
    assert size(shapes(deep)['params']) == 25_557_032


def test_names() -> None:
    """Layers by partial, with names; convolutions without biases; statistics."""
    variables = shapes(SMALL)
    assert set(variables) == {'params', 'batch_stats'}
    blocks = {'stage1_block0', 'stage2_block0'}
    assert set(variables['params']) == {'conv_init', 'bn_init', 'head'} | blocks
    assert set(variables['params']['conv_init']) == {'kernel'}
    layers = {'conv1', 'bn1', 'conv2', 'bn2'}
    assert set(variables['params']['stage1_block0']) == layers
    assert set(variables['params']['stage2_block0']) == layers | {'conv_proj', 'bn_proj'}


@pytest.mark.slow
def test_a_block_starts_as_its_shortcut() -> None:
    """The last scale of each block starts at zero."""
    one = SMALL.clone(stages=(1,))
    more = SMALL.clone(stages=(3,))
    variables = more.init(jax.random.key(0), X)
    fewer = {
        name: {k: x for k, x in tree.items() if not re.match('stage1_block[12]', k)}
        for name, tree in variables.items()
    }
    np.testing.assert_allclose(more.apply(variables, X), one.apply(fewer, X), rtol=1e-6)
    for path, x in jax.tree_util.tree_leaves_with_path(variables['params']):
        if jax.tree_util.keystr(path).endswith("['bn2']['scale']"):
            assert not x.any()


@pytest.mark.slow
@pytest.mark.parametrize(('stem', 'side'), [('large', 2), ('small', 8)])
def test_stems(stem: Any, side: int) -> None:
    """The large stem divides height and width by four; each stage except the first halves them."""
    model = SMALL.clone(stem=stem, stages=(1, 1, 1))
    _, state = model.init_with_output(jax.random.key(0), X, capture_intermediates=True)
    seen = state['intermediates']['stage3_block0']['__call__'][0]
    assert seen.shape == (4, side, side, 32)


@pytest.mark.slow
def test_statistics_are_updated_in_training_only() -> None:
    """`mutable=['batch_stats']` returns them; without it training mode is an error."""
    variables = SMALL.init(jax.random.key(0), X)
    logits, new = SMALL.apply(variables, X, True, mutable=['batch_stats'])
    assert logits.shape == (4, 10)
    mean = new['batch_stats']['bn_init']['mean']
    assert np.abs(mean).max() > 0
    with pytest.raises(errors.ModifyScopeVariableError):
        SMALL.apply(variables, X, True)
    assert SMALL.apply(variables, X).shape == (4, 10)


def test_unknown_options_are_errors() -> None:
    with pytest.raises(ValueError, match="block: 'deep' is none of basic, bottleneck"):
        shapes(SMALL.clone(block='deep'))
    with pytest.raises(ValueError, match="stem: 'tiny' is none of large, small"):
        shapes(SMALL.clone(stem='tiny'))


@pytest.mark.slow
def test_half_precision() -> None:
    """Bfloat16 computation, float32 parameters and statistics."""
    model = SMALL.clone(dtype=jnp.bfloat16)
    logits, variables = model.init_with_output(jax.random.key(0), X)
    assert logits.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_weights_of_pytorch() -> None:
    """A ResNet-18 with torchvision's names gives the same output as in PyTorch."""
    torch = pytest.importorskip('torch')
    from tests.weights import torch_networks
    from tests.weights.test_from_torch import first, scramble

    theirs = scramble(torch_networks.ResNet())
    mine = ResNet(stages=(2, 2, 2, 2), num_classes=10)
    x = np.random.default_rng(0).normal(size=(2, 65, 64, 3)).astype('f4')
    variables = mine.init(jax.random.key(0), x)
    made = restore.torch_variables(theirs.state_dict(), variables, rename=TORCHVISION)
    with torch.no_grad():
        expected = theirs(first(x)).numpy()
    found = np.asarray(mine.apply(made, x))
    assert abs(found - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.slow
def test_the_config(tmp_path: pathlib.Path) -> None:
    """Batch statistics are updated, and the moving average is evaluated too."""
    limit = {
        f'{data}__source__limit': 64
        for data in ('data', 'evals__test__data', 'evals__test_ema__data')
    }
    experiment = load_and_build(
        str(ROOT / 'configs' / 'mnist_resnet.py'), train_for='6 steps', data__batch_size=32,
        model__features=8, checkpoint__every='never', **limit,
    )  # fmt: skip
    trainer = Trainer(experiment, tmp_path)
    before = jax.device_get(trainer.init_state()).collections['batch_stats']
    result = trainer.fit()
    after = result.state.collections['batch_stats']
    same = jax.tree.map(np.array_equal, before, jax.device_get(after))
    assert not any(jax.tree.leaves(same))
    metrics = result.metrics
    assert metrics['eval/test/loss'] != metrics['eval/test_ema/loss']
    assert metrics['eval/test/examples'] == metrics['eval/test_ema/examples'] == 64
