# SPDX-License-Identifier: Apache-2.0
"""Texts of overrides become values of the type of their key, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.examples import apply_overrides, config
from trainer.config import overrides
from trainer.config.errors import UserError


def test_values_get_the_type_of_the_default() -> None:
    new = apply_overrides(
        'seed=3', 'optimizer.learning_rate=1', 'optimizer.nesterov=true', 'train_for=500steps',
        'model.features=(32, 5)', 'vars.pairs=((5, 6), (7, 8))', 'data.transforms[1].padding=3',
        'vars.numbers=[1, 2, 3]', "vars.names=('x', 'y', 'z')", 'data.source.split=test',
    )  # fmt: skip
    assert new['seed'] == 3
    assert new['optimizer']['learning_rate'] == 1.0
    assert isinstance(new['optimizer']['learning_rate'], float)
    assert new['optimizer']['nesterov'] is True
    assert new['train_for'] == '500 steps'
    assert new['model']['features'] == (32, 5)
    assert new['vars'] == {
        'pairs': ((5, 6.0), (7, 8.0)), 'names': ('x', 'y', 'z'), 'numbers': [1, 2, 3]
    }  # fmt: skip
    assert new['data']['transforms'][1] == {
        'target': 'trainer.data.transforms:RandomCrop',
        'padding': 3,
    }
    assert new['data']['transforms'][0] == {
        'target': 'trainer.data.transforms:ToFloat',
        'key': 'image',
    }


@pytest.mark.parametrize(
    'assignment',
    [
        'seed=3.0', 'seed=true', 'optimizer.learning_rate=fast', 'optimizer.nesterov=2',
        'train_for=5', 'model.features=(1, 2, "3")', 'model.features=(1, 2.5)', 'model.features=3',
        'vars.pairs=((1, 2), 3)', 'data.transforms[2].padding=1', 'data.batch_size="a"',
        'optimizer=sgd', 'data.remainder=none',
    ],
)  # fmt: skip
def test_wrong_types_and_arities_are_errors(assignment: str) -> None:
    with pytest.raises(UserError, match=r'config\.' + assignment.split('=')[0].split('[')[0]):
        apply_overrides(assignment)


@pytest.mark.parametrize(
    ('text', 'value'),
    [('true', True), ('True', True), ('1', True), ('no', False), ('0', False), ('FALSE', False)],
)
def test_texts_of_bools(text: str, value: bool) -> None:
    for new in (
        apply_overrides(f'optimizer.nesterov={text}')['optimizer']['nesterov'],
        apply_overrides(f'data.shuffle={text}')['data']['shuffle'],
    ):
        assert new is value


def test_numbers_and_texts() -> None:
    new = apply_overrides('optimizer.momentum=1e-3', 'data.source.split=7', 'train_for="3 epochs"')
    assert new['optimizer']['momentum'] == 0.001
    assert new['data']['source']['split'] == '7'
    assert new['train_for'] == '3 epochs'


def test_elements_of_nested_tuples() -> None:
    new = apply_overrides('vars.pairs[1][0]=9', 'model.features[-1]=7', 'vars.names=()')
    assert new['vars']['pairs'] == ((1, 2.0), (9, 4.0))
    assert new['model']['features'] == (64, 7)
    assert new['vars']['names'] == ()
    for wrong in ('vars.pairs=((1.5, 2), (3, 4))', 'vars.pairs=((1,), (3, 4))', 'vars.pairs=5'):
        with pytest.raises(UserError, match=r'config\.vars\.pairs'):
            apply_overrides(wrong)


def test_never_is_ordinary_text_outside_durations() -> None:
    changed = config()
    changed.model.padding = 'never'
    overrides.apply(changed, [('model.padding', 'always')])
    assert changed.model.padding == 'always'


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        ('optimizer.momentum', None),
        ('optimizer.clip_norm', None),
        ('task.weight', None),
        ('ema', None),
        ('data.seed', None),
    ],
)
def test_none_where_it_is_allowed(path: str, value: None) -> None:
    node: Any = apply_overrides(f'{path}=None')
    for key in path.split('.'):
        node = node[key]
    assert node is value


@pytest.mark.parametrize('path', ['model.dropout_rate', 'optimizer.learning_rate', 'seed'])
def test_none_where_it_is_not_allowed(path: str) -> None:
    with pytest.raises(UserError, match=f'config.{path}: expected '):
        apply_overrides(f'{path}=None')


@pytest.mark.parametrize('text', ['1e400', '-1e400', '1e309'])
def test_a_number_that_overflows_is_not_infinity(text: str) -> None:
    for path in ('optimizer.learning_rate', 'optimizer.clip_norm', 'seed', 'model.hidden_scale'):
        changed = config()
        changed.model.hidden_scale = None
        with pytest.raises(UserError, match=rf'^config\.{path}: {text} is too large for a float'):
            overrides.apply(changed, [(path, text)])
    for beside in ('Infinity', '1'):
        with pytest.raises(UserError, match=r'^config\.vars\.numbers\[\d\]: .* is too large'):
            changed = config()
            changed.vars.numbers = [0.5, 0.5]
            overrides.apply(changed, [('vars.numbers', f'[{beside}, {text}]')])
    with pytest.raises(UserError, match='is too large for a float'):
        apply_overrides(f'optimizer={{"learning_rate": {text}}}')
    assert apply_overrides(f'data.source.split={text}')['data']['source']['split'] == text


@pytest.mark.parametrize('text', ['inf', 'Infinity', '-inf', '-Infinity'])
def test_explicit_infinity(text: str) -> None:
    for path in ('optimizer.learning_rate', 'optimizer.clip_norm'):
        assert apply_overrides(f'{path}={text}')['optimizer'][path.partition('.')[2]] == float(text)
    changed = config()
    changed.vars.numbers = (0.5, 0.5)
    overrides.apply(changed, [('vars.numbers', f'({text}, 1.0)')])
    assert changed.vars.numbers == [float(text), 1.0]
    assert apply_overrides(f'data.source.split={text}')['data']['source']['split'] == text


@pytest.mark.parametrize(
    ('path', 'text'),
    [
        ('seed', '9' * 400),
        ('optimizer.learning_rate', '9' * 400),
        ('optimizer.clip_norm', '9' * 400),
        ('model.features', f'(64, {"9" * 400})'),
        ('model.features', '0x' + 'f' * 5000),
        ('data.source', 'x' * 20_000),
        ('train_for', 'x' * 20_000),
        ('data.remainder', 'x' * 20_000),
        ('model.target', 'x' * 20_000),
        ('optimizer.nesterov', 'x' * 20_000),
        ('model', '{"' + 'x' * 20_000 + '": 1}'),
    ],
)
def test_long_values_are_shortened(path: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides(f'{path}={text}')
    assert len(str(error.value)) < 400
