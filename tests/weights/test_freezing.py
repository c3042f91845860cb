# SPDX-License-Identifier: Apache-2.0
"""Three ways to freeze a loaded backbone, and loading between module systems."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from tests.weights.examples import assert_same, flatten, pretrain, trainer
from trainer.config.errors import UserError


def frozen_loss(model: Any, batch: Any) -> jax.Array:
    """Cross-entropy without a gradient into the backbone."""
    logits = model.stop_gradient('backbone/.*')(batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])


def plain(model: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(batch['image']), batch['label'])


def head_only(learning_rate: float) -> optax.GradientTransformation:
    """Returns the optimizer of the guide: only the head is trained."""

    def labels(params: Any) -> Any:
        return traverse_util.path_aware_map(
            lambda path, _: 'frozen' if 'backbone' in path else 'trainable', params
        )

    parts = {'trainable': optax.adam(learning_rate), 'frozen': optax.set_to_zero()}
    return optax.multi_transform(parts, labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        {'task': {'ref': f'{__name__}:frozen_loss'}},
        {'optimizer__freeze': 'backbone/.*'},
        {'optimizer__target': f'{__name__}:head_only'},
    ],
    ids=['stop_gradient', 'freeze', 'multi_transform'],
)  # fmt: skip
def test_three_ways_to_freeze(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    """Each keeps the loaded backbone, bit for bit, and trains the same head."""
    path, old = pretrain(tmp_path)
    common = {'train_for': '50 steps', 'init_from': {'path': path}, 'log__every': '50 steps'}
    task = {'task': {'ref': f'{__name__}:plain'}}
    state = trainer(tmp_path, **common, **{**task, **options}).fit().state
    assert_same(state.params['backbone'], old.params['backbone'])
    frozen = trainer(tmp_path, **common, **task, optimizer__freeze='backbone/.*').fit().state
    for name, x in frozen.params['head'].items():
        np.testing.assert_allclose(state.params['head'][name], x, atol=1e-6)
        assert (np.asarray(x) != old.params['head'][name]).any()


NNX = {
    'model': {
        'target': 'trainer.models.mlp_nnx:MLP',
        'inputs': 8,
        'features': (12, 3),
        'batch_norm': True,
    },
    'step': {'ref': 'tests.step.steps:step_by_hand'},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('options', 'frozen'),
    [({}, 'backbone/.*'), (NNX, '(dense|norm)/0/.*')],
    ids=['linen', 'nnx'],
)
def test_statistics_of_a_frozen_part(
    tmp_path: pathlib.Path, options: dict[str, Any], frozen: str
) -> None:
    """They do not change by a bit, in the default step or in a custom one."""
    options = {'train_for': '5 steps', 'optimizer__freeze': frozen, **options}
    run = trainer(tmp_path, **options, optimizer__freeze_statistics=frozen)
    start, end = jax.device_get(run.init_state()), run.fit().state
    assert 'mean' in str(jax.tree.structure(start.collections))
    assert_same(end.collections['batch_stats'], start.collections['batch_stats'])
    before, after = flatten(start.params), flatten(end.params)
    moved = {path for path, x in after.items() if (x != before[path]).any()}
    assert moved == {path for path in before if not re.fullmatch(frozen, path)}
    with pytest.raises(
        UserError,
        match=r"freeze_statistics: the pattern 'norm' matches no variable other than parameters",
    ):
        trainer(tmp_path, **options, optimizer__freeze_statistics='norm').init_state()


@pytest.mark.slow
def test_from_linen_to_nnx(tmp_path: pathlib.Path) -> None:
    """Only the paths differ, so a list of renames is enough."""
    mnist = {
        'data__source': {'target': 'trainer.data.mnist:MNIST', 'split': 'train', 'limit': 64},
        'data__device_transforms': ({'target': 'trainer.data.transforms:ToFloat'},),
    }
    linen = trainer(tmp_path, 'linen', train_for='2 steps', model={
        'target': 'trainer.models.cnn:CNN', 'hidden': 16}, **mnist)  # fmt: skip
    state = linen.fit().state
    names = (('Conv_0', 'conv1'), ('Conv_1', 'conv2'), ('Dense_0', 'dense1'), ('Dense_1', 'dense2'))
    nnx = trainer(
        tmp_path, model={'target': 'trainer.models.cnn_nnx:CNN', 'hidden': 16},
        init_from={'path': str(tmp_path / 'linen'), 'rename': names}, **mnist,
    )  # fmt: skip
    loaded = nnx.init_state()
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype('f4')
    np.testing.assert_allclose(nnx.model(loaded)(x), linen.model(state)(x), atol=1e-6)
