# SPDX-License-Identifier: Apache-2.0
"""The device transforms of the package: mixtures of examples, and images of another size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.device_transforms import Mixup, Resize
from trainer.input.structure import Structure
from trainer.tasks.batch import PlainBatch, view_batch
from trainer.tasks.classification import Classification

BATCH: Any = {
    'image': jnp.arange(24.0).reshape(4, 3, 2),
    'label': jnp.array([2, 0, 1, 2]),
    'other': jnp.ones(4),
}


def mix(seed: int = 0, **options: Any) -> Any:
    return Mixup(num_classes=3, **options)(BATCH, jax.random.key(seed), True)


def test_fields_of_a_nested_batch_are_named_by_path() -> None:
    image, label, other = (BATCH[name] for name in ('image', 'label', 'other'))
    deep = {'views': {'pair': (image, other)}, 'target': {'label': label}}
    structure = Structure.from_tree(deep, '')
    assert structure is not None
    batch = view_batch(structure, structure.flatten(deep, ''), 'a test')
    transform = Mixup(num_classes=3, inputs='views/pair/0', label='target/label')
    found, expected = transform(batch, jax.random.key(0), True), mix()
    np.testing.assert_array_equal(found['views']['pair'][0], expected['image'])
    np.testing.assert_array_equal(found['target']['label'], expected['label'])
    # What one transform returns is what the next one reads.
    assert PlainBatch(found)['views/pair/1'] is other
    with pytest.raises(UserError, match=r'views: {pair: '):
        PlainBatch(found)['views/image']


def test_inputs_and_labels_are_mixed_with_the_same_weights() -> None:
    """Each example with the one before it, and its own weight is the larger one."""
    mixed = mix(alpha=1.0)
    before = np.roll(np.arange(4), 1)
    x, labels = np.asarray(BATCH['image']), np.asarray(BATCH['label'])
    # The weight follows from any one element of the input.
    own = np.asarray((mixed['image'] - x[before]) / (x - x[before]))[:, 0, 0]
    assert ((own >= 0.5) & (own <= 1)).all()
    assert len(np.unique(own)) == 4
    weights = own[:, None, None]
    np.testing.assert_allclose(mixed['image'], weights * x + (1 - weights) * x[before], rtol=1e-5)
    expected = own[:, None] * np.eye(3)[labels] + (1 - own)[:, None] * np.eye(3)[labels[before]]
    np.testing.assert_allclose(mixed['label'], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed['label'].sum(axis=1), 1, rtol=1e-6)
    assert mixed['other'] is BATCH['other']


def test_weights_depend_on_the_key_and_on_alpha() -> None:
    np.testing.assert_array_equal(mix(seed=1)['image'], mix(seed=1)['image'])
    assert (mix(seed=1)['image'] != mix(seed=2)['image']).any()
    hardly = mix(alpha=1e-3)
    np.testing.assert_allclose(hardly['image'], BATCH['image'], atol=0.5)


def test_nothing_is_mixed_in_evaluation() -> None:
    assert Mixup(num_classes=3)(BATCH, jax.random.key(0), False) == BATCH


def test_a_label_out_of_range_is_an_error_of_the_task() -> None:
    """Also in a mixture with a valid one."""
    mixed = Mixup(num_classes=2)(BATCH, jax.random.key(0), True)
    wrong = np.asarray(mixed['label'].min(axis=1) < 0)
    # Labels 2 are in rows 0 and 3; row 1 is mixed with row 0, row 0 with row 3.
    assert wrong.tolist() == [True, True, False, True]
    output = Classification()(lambda x: jnp.zeros((4, 2)), mixed)
    check = output.checks['label']
    assert (check.low, check.high) == (0, 1)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image': jnp.zeros((4, 2), jnp.uint8)}, "'image' is uint8; put Mixup after ToFloat"),
        ({'label': jnp.zeros((4, 3))}, r"'label' is float32\[4, 3\]; expected integers \[4\]"),
    ],
)
def test_other_fields_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixup(num_classes=3)({**BATCH, **change}, jax.random.key(0), True)


def test_alpha_must_be_positive() -> None:
    with pytest.raises(ValueError, match='alpha: 0; expected a positive number'):
        Mixup(num_classes=3, alpha=0)


def test_images_are_resized() -> None:
    """Twice as large and linear in between; smaller ones are smoothed."""
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    larger = Resize(size=(8, 8))({'image': images, 'label': 3})
    assert larger['label'] == 3
    np.testing.assert_allclose(larger['image'][0, 0, :4, 0], [0, 0.25, 0.75, 1.25], atol=1e-6)
    smaller = Resize(size=(2, 4))({'image': images})['image']
    assert smaller.shape == (1, 2, 4, 1)
    np.testing.assert_array_equal(Resize(size=(4, 4))({'image': images})['image'], images)


@pytest.mark.parametrize('images', [jnp.zeros((2, 4, 4)), jnp.zeros((2, 4, 4, 1), jnp.uint8)])
def test_only_images_are_resized(images: jax.Array) -> None:
    with pytest.raises(UserError, match=r'expected floating-point images .* put Resize after ToFl'):
        Resize(size=(2, 2))({'image': images})
