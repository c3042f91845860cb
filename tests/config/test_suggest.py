# SPDX-License-Identifier: Apache-2.0
"""Suggestions for misspelled names and key paths."""

from __future__ import annotations

import pytest

from trainer.config import suggest

CONFIG = {
    'model': {'width': 64},
    'optimizer': {'learning_rate': 0.1, 'groups': {'head': {'learning_rate': 0.2}}},
    'data': {'batch_size': 32, 'transforms': ({'size': 28},)},
}


def test_paths_of_dicts_and_sequences() -> None:
    found = list(suggest.paths(CONFIG['data'], 'config.data'))
    assert found == [
        'config.data.batch_size',
        'config.data.transforms',
        'config.data.transforms[0]',
        'config.data.transforms[0].size',
    ]


@pytest.mark.parametrize(
    ('path', 'nearest'),
    [
        ('config.model.widht', 'config.model.width'),
        ('config.batch_size', 'config.data.batch_size'),
        # Both end in the same key: the rest of the path decides.
        ('config.optimizer.group.head.learning_rate', 'config.optimizer.groups.head.learning_rate'),
        ('config.optimizer.lerning_rate', 'config.optimizer.learning_rate'),
        # No similar key: the longest beginning of the path.
        ('config.optimizer.groups.head.xyz', 'config.optimizer.groups.head'),
        ('config.xyz', None),
    ],
)
def test_nearest_path(path: str, nearest: str | None) -> None:
    assert suggest.nearest_path(path, suggest.paths(CONFIG, 'config')) == nearest


def test_a_name_below_the_cutoff_is_not_suggested() -> None:
    assert suggest.nearest_name('adma', ['adam', 'sgd']) == 'adam'
    assert suggest.nearest_name('lion', ['adam', 'sgd']) is None


def test_the_question_or_where_to_look() -> None:
    assert suggest.did_you_mean('config.model.widht', CONFIG) == 'Did you mean config.model.width?'
    # A path that the config contains is not suggested for itself.
    assert suggest.did_you_mean('config.model', {'model': 1}) == 'See --helpconfig for all keys.'
