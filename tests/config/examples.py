# SPDX-License-Identifier: Apache-2.0
"""Small configs for the tests of `trainer.config`."""

from __future__ import annotations

from typing import Any

import ml_collections

from trainer.config import loading, overrides


def config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            train_for='2 epochs',
            model=dict(target='trainer.models.mlp:MLP', features=(64, 10), dropout_rate=0.0),
            task=dict(target='trainer.tasks:Classification', weight=None),
            optimizer=dict(target='optax:sgd', learning_rate=0.1, momentum=0.9, nesterov=False),
            data=dict(
                source=dict(target='trainer.data.mnist:MNIST', split='train'),
                batch_size=32,
                transforms=(
                    dict(target='trainer.data.transforms:ToFloat', key='image'),
                    dict(target='trainer.data.transforms:RandomCrop', padding=2),
                ),
            ),
            vars=dict(pairs=((1, 2.0), (3, 4.0)), names=('a', 'b'), numbers=[1, 2]),
        )
    )


def apply_overrides(*assignments: str) -> dict[str, Any]:
    changed = config()
    parts = (a.partition('=') for a in assignments)
    overrides.apply(changed, [(path, text) for path, _, text in parts])
    return loading.to_plain(changed)


def config_with_references() -> ml_collections.ConfigDict:
    changed = config()
    changed.vars = ml_collections.ConfigDict(dict(width=3))
    changed.model.hidden = changed.vars.get_ref('width')
    changed.model.layers = (
        changed.vars.get_ref('width') * 2,
        dict(a=changed.vars.get_ref('width')),
    )
    return changed
