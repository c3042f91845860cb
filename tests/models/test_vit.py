# SPDX-License-Identifier: Apache-2.0
"""Vision transformers and mixers: sizes, positions, and Linen equal to NNX."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from tests.marks import slow_except
from trainer.models.mixer import Mixer
from trainer.models.mixer_nnx import Mixer as NNXMixer
from trainer.models.vit import ViT, sincos_positions
from trainer.models.vit_nnx import ViT as NNXViT
from trainer.models.vit_nnx import sincos_positions as nnx_sincos_positions

X = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype('f4')
VIT = dict(num_classes=5, patch_size=4, layers=2, width=16, heads=2)
MIXER = dict(num_classes=5, patch_size=4, layers=2, width=16, tokens_width=6)
PAIRS = {
    'vit': (ViT, NNXViT, VIT),
    'vit, sincos and token': (ViT, NNXViT, {**VIT, 'positions': 'sincos', 'pool': 'token'}),
    'mixer': (Mixer, NNXMixer, MIXER),
}


def count(model: Any) -> int:
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_parameter_counts() -> None:
    """As published for S/16: that of ViT has a position for its class token."""
    assert count(ViT(pool='token')) == 22_050_664 - 384
    assert count(ViT(positions='sincos')) == 22_050_664 - 197 * 384 - 384
    assert count(Mixer()) == 18_528_264


def random_parameters(params: Any) -> dict[str, np.ndarray]:
    """Returns random parameters by path: those of a new head are zero."""
    rng = np.random.default_rng(1)
    flat = traverse_util.flatten_dict(params, sep='/')
    return {path: rng.normal(size=x.shape, scale=0.2).astype('f4') for path, x in flat.items()}


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the arrays by their paths in the Linen model."""
    flat = traverse_util.flatten_dict(tree)
    paths = {path: '/'.join(map(str, path)) for path in flat}
    return {re.sub('^blocks/', 'blocks_', paths[path]): x for path, x in flat.items()}


@pytest.mark.parametrize('name', slow_except(['vit'], PAIRS))
def test_linen_equals_nnx(name: str) -> None:
    """Names and shapes of the parameters, features, logits and gradients."""
    linen_class, nnx_class, options = PAIRS[name]
    linen = linen_class(**options)
    model = nnx_class(**options, size=8, channels=2, rngs=nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    shapes = jax.eval_shape(linen.init, jax.random.key(0), X)['params']
    flat = random_parameters(shapes)
    mine = flatten(nnx.to_pure_dict(state))
    assert {path: x.shape for path, x in mine.items()} == {n: x.shape for n, x in flat.items()}

    def run_linen(params: Any) -> Any:
        outputs = [linen.apply({'params': params}, X, method=m) for m in ('features', '__call__')]
        return jnp.square(outputs[1]).sum(), outputs

    def run_nnx(params: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        outputs = [model.features(X), model(X)]
        return jnp.square(outputs[1]).sum(), outputs

    params = traverse_util.unflatten_dict(flat, sep='/')
    gradient, (features, logits) = jax.jit(jax.grad(run_linen, has_aux=True))(params)
    assert (features.shape, logits.shape) == ((3, 16), (3, 5))
    assert np.asarray(logits).std() > 0.1

    copied = {
        path: flat[re.sub('^blocks/', 'blocks_', '/'.join(map(str, path)))]
        for path in traverse_util.flatten_dict(nnx.to_pure_dict(state))
    }
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(copied))
    found, outputs = jax.jit(jax.grad(run_nnx, has_aux=True))(state)
    np.testing.assert_allclose(outputs[0], features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs[1], logits, rtol=1e-4, atol=1e-5)
    expected = traverse_util.flatten_dict(gradient, sep='/')
    for path, x in flatten(nnx.to_pure_dict(found)).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-3, atol=1e-3, err_msg=path)


@pytest.mark.parametrize('function', [sincos_positions, nnx_sincos_positions])
def test_sincos_positions(function: Any) -> None:
    """By their definition, one number at a time."""
    rows, columns, width = 2, 3, 12
    found = np.asarray(function(rows, columns, width))
    assert found.shape == (6, 12)
    for row in range(rows):
        for column in range(columns):
            waves = [10_000 ** -(i / 2) for i in range(3)]
            expected = [
                f(x * wave) for x in (column, row) for f in (math.sin, math.cos) for wave in waves
            ]
            np.testing.assert_allclose(found[row * columns + column], expected, atol=1e-6)


def test_sincos_positions_fit_images_of_any_size() -> None:
    model = ViT(**VIT, positions='sincos')
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    larger = np.zeros((1, 16, 12, 2), 'f4')
    assert jax.eval_shape(model.apply, variables, larger).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize('name', slow_except(['vit'], PAIRS))
def test_dropout_is_active_in_training_only(name: str) -> None:
    linen_class, _, options = PAIRS[name]
    model = linen_class(**options, dropout_rate=0.5)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    call = jax.jit(model.apply, static_argnames=('train', 'method'))

    def features(train: bool, key: int) -> Any:
        rngs = {'dropout': jax.random.key(key)}
        return np.asarray(call(variables, X, train=train, rngs=rngs, method='features'))

    np.testing.assert_array_equal(features(False, 1), features(False, 2))
    assert (features(True, 1) != features(True, 2)).any()


@pytest.mark.parametrize('model', [ViT, NNXViT])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'heads': 3}, 'heads=3 does not divide width=16'),
        ({'positions': 'fixed'}, "positions: 'fixed' is none of learned, sincos"),
        ({'pool': 'max'}, "pool: 'max' is none of mean, token"),
    ],
)
def test_invalid_options(model: Any, options: dict[str, Any], message: str) -> None:
    options = {**VIT, **options, **({} if model is ViT else {'rngs': nnx.Rngs(0)})}
    with pytest.raises(ValueError, match=message):
        model(**options)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: ViT(patch_size=3), r'patch_size=3 does not divide images \(8, 8\)'),
        (lambda: Mixer(patch_size=3), r'patch_size=3 does not divide images \(8, 8\)'),
        (lambda: nnx_model(NNXViT, patch_size=3), r'patch_size=3 does not divide images \(8, 8\)'),
        (
            lambda: nnx_model(NNXViT, size=16),
            r'have 2 x 2 patches, .* positions for 16: set `size`',
        ),
        (lambda: nnx_model(NNXMixer, size=16), r'images \(8, 8\); the model is for size=16'),
        (lambda: nnx_model(NNXMixer, patch_size=3), 'patch_size=3 does not divide size=8'),
        (lambda: ViT(width=6, heads=1, patch_size=4, positions='sincos'), 'a multiple of 4'),
    ],
)
def test_images_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model = make()
        model(X) if isinstance(model, nnx.Module) else jax.eval_shape(
            model.init, jax.random.key(0), X
        )


def nnx_model(model: Any, **options: Any) -> Any:
    common = VIT if model is NNXViT else MIXER
    return model(**{**common, 'size': 8, 'channels': 2, **options}, rngs=nnx.Rngs(0))
