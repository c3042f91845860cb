# SPDX-License-Identifier: Apache-2.0
"""A wrong path is told with the one that was probably meant."""

from __future__ import annotations

import pytest

from tests.config.examples import applied, config, referencing
from trainer.config import loading, overrides, schema
from trainer.config.errors import UserError


@pytest.mark.parametrize(
    ('path', 'meant'),
    [
        ('modle.features', 'config.model.features'),
        ('model.feature', 'config.model.features'),
        ('model.learning_rate', 'config.optimizer.learning_rate'),
        ('optimizer.momentun', 'config.optimizer.momentum'),
        ('data.transforms[1].paddin', 'config.data.transforms[1].padding'),
        ('checkpoint.evry', 'config.checkpoint.every'),
        ('batch_size', 'config.data.batch_size'),
    ],
)
def test_suggestions(path: str, meant: str) -> None:
    with pytest.raises(UserError) as error:
        applied(f'{path}=1')
    assert f'Did you mean {meant}?' in str(error.value)


@pytest.mark.parametrize(
    ('path', 'meant'),
    [
        ('optimizer.learning_rat', 'config.optimizer.learning_rate'),
        ('data.batch_siz', 'config.data.batch_size'),
        ('evals.tset.every', 'config.evals.test.every'),
        ('evals.tset.data.source.split', 'config.evals.test.data.source.split'),
        ('modle.featurs', 'config.model.features'),
    ],
)
def test_more_suggestions(path: str, meant: str) -> None:
    changed = config()
    changed.evals = dict(test=dict(data=dict(source=dict(target='data.mnist:MNIST', split='a'))))
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [(path, '1')])
    assert str(error.value).startswith(f'config.{path}: there is no such key.')
    assert f'Did you mean {meant}?' in str(error.value)


def test_no_suggestion_names_a_key_that_does_not_exist() -> None:
    changed = config()
    del changed['vars']
    with pytest.raises(UserError) as error:
        overrides.apply(changed, [('vars.width', '1')])
    assert 'config.evals.width' not in str(error.value)


def test_a_misspelt_variable() -> None:
    with pytest.raises(UserError, match=r'Did you mean config\.vars\.width\?'):
        overrides.apply(referencing(), [('vars.widht', '7')])


@pytest.mark.parametrize(
    ('path', 'hint'),
    [
        ('checkpoint.best.modee', 'Did you mean config.checkpoint.best.mode?'),
        ('ema.decya', 'Did you mean config.ema.decay?'),
        ('seed.x', 'Did you mean config.seed?'),
        ('nothing_like_it', 'See --helpconfig for all keys.'),
        ('optimizer.unheard_of', 'optax:sgd takes no such argument. It takes: learning_rate, '),
    ],
)
def test_suggestions_are_likely_or_none(path: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        applied(f'{path}=1')
    assert hint in str(error.value)


def test_a_wrong_key_of_the_file_is_compared_with_the_fixed_keys() -> None:
    changed = loading.plain(config())
    changed['checkpoint'] = {'keep_lst': 3}
    with pytest.raises(UserError, match=r'keep_lst is .* mean config\.checkpoint\.keep_last\?'):
        schema.read(changed)
