# SPDX-License-Identifier: Apache-2.0
"""Command-line overrides: paths, merging of dicts, references and messages."""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from tests.command import ROOT
from tests.config.examples import apply_overrides, config, config_with_references
from trainer.config import loading, overrides, paths, schema
from trainer.config.errors import UserError


def test_dicts_merge() -> None:
    new = apply_overrides('optimizer={"learning_rate": 0.5}', 'data={"batch_size": 8}')
    assert new['optimizer'] == {**config().optimizer.to_dict(), 'learning_rate': 0.5}
    assert new['data']['batch_size'] == 8
    assert new['data']['source']['split'] == 'train'


@pytest.mark.parametrize(
    'form', ['optimizer.target=optax:adam', 'optimizer={"target": "optax:adam"}']
)
def test_a_new_target_keeps_its_arguments_and_reports_dropped_ones(form: str) -> None:
    changed = config()
    path, _, text = form.partition('=')
    (override,) = overrides.apply(changed, [(path, text)])
    new = loading.to_plain(changed)['optimizer']
    assert new == {'target': 'optax:adam', 'learning_rate': 0.1, 'nesterov': False}
    assert override.notes == ('config.optimizer.momentum dropped: optax:adam does not take it',)


def test_a_number_becomes_a_schedule_and_back() -> None:
    schedule = '{"target": "optax:linear_schedule", "init_value": 0.1, "end_value": 0}'
    assert apply_overrides(f'optimizer.learning_rate={schedule}')['optimizer']['learning_rate'] == {
        'target': 'optax:linear_schedule', 'init_value': 0.1, 'end_value': 0,
    }  # fmt: skip
    back = apply_overrides(f'optimizer.learning_rate={schedule}', 'optimizer.learning_rate=0.3')
    assert back['optimizer']['learning_rate'] == 0.3


def test_keys_that_the_file_does_not_set() -> None:
    new = apply_overrides(
        'task.weight=confidence', 'optimizer.accumulator_dtype=None', 'ema.decay=0.9',
        'data.repeat_batch=1', 'checkpoint.best.metric=eval/test/loss', 'mesh={"data": 2, "x": 4}',
        'model.batch_norm=true', 'optimizer.clip_norm=1', 'optimizer.nesterov=yes',
    )  # fmt: skip
    assert new['task']['weight'] == 'confidence'
    assert new['ema'] == {'decay': 0.9}
    assert new['data']['repeat_batch'] == 1
    assert new['checkpoint'] == {'best': {'metric': 'eval/test/loss'}}
    assert new['mesh'] == {'data': 2, 'x': 4}
    assert new['model']['batch_norm'] is True
    assert schema.read({k: v for k, v in new.items() if k != 'vars'}).optimizer.clip_norm == 1.0


def test_none_within_a_dict_is_none() -> None:
    """As in `--config.task.weight=None`, rather than the text 'None'."""
    for none in ('task={"weight": null}', 'task.weight=None'):
        assert apply_overrides('task.weight=confidence', none)['task']['weight'] is None


def test_references_get_the_value_of_their_variable() -> None:
    changed = config()
    changed.vars.width = 10
    changed.model.width = changed.vars.get_ref('width') * 2
    overrides.apply(changed, [('vars.width', '7')])
    assert changed.model.width == 14


def test_a_variable_that_nothing_references_is_an_error() -> None:
    changed = config()
    changed.vars = ml_collections.ConfigDict(dict(width=3))
    changed.model.hidden = changed.vars.get_ref('width') + 1
    loading.check_vars(changed)
    changed.vars.depth = 2
    with pytest.raises(UserError, match=r'config\.vars\.depth is not used'):
        loading.check_vars(changed)


def test_variables_may_have_any_type() -> None:
    """A run reads them only through their references."""
    changed = config()
    changed.vars = ml_collections.ConfigDict(dict(width=3, names=('a', 'b'), inner=dict(x=1.5)))
    changed.model.widths = (changed.vars.get_ref('width'),)
    assert schema.read(loading.to_plain(changed)).vars['inner'] == {'x': 1.5}


def test_command_lines() -> None:
    spec, assignments, rest = overrides.parse_argv(
        ['--config=a.py:b', '--config.x=1', '--config.y', '2', '--mode=train', 'stray']
    )
    assert (spec, assignments, rest) == (
        'a.py:b', [('x', '1'), ('y', '2')], ['--mode=train', 'stray'],
    )  # fmt: skip
    with pytest.raises(UserError, match='needs a value'):
        overrides.parse_argv(['--config.y', '--config.z=1'])


def test_no_jax_until_targets_are_imported() -> None:
    code = (
        'import sys\n'
        'from trainer.config import loading, overrides, schema, show\n'
        "loaded = loading.load('configs/mnist.py')\n"
        "overrides.apply(loaded.config, [('optimizer.learning_rate', '0.1')])\n"
        'schema.read(loading.to_plain(loaded.config))\n'
        "assert not {'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=60)


def test_an_unset_argument_of_a_list_element() -> None:
    new = apply_overrides('data.transforms[0].scale=0.5')
    assert new['data']['transforms'] == (
        {'target': 'trainer.data.transforms:ToFloat', 'key': 'image', 'scale': 0.5},
        {'target': 'trainer.data.transforms:RandomCrop', 'padding': 2},
    )


def test_negative_indices() -> None:
    changed = config()
    (override,) = overrides.apply(changed, [('data.transforms[-1].padding', '5')])
    assert override.value_path == 'data.transforms[1].padding'
    assert loading.to_plain(changed)['data']['transforms'][1]['padding'] == 5


def test_a_merge_keeps_other_keys_at_every_depth() -> None:
    before = loading.to_plain(config())
    new = apply_overrides('data={"source": {"limit": 10}}')
    assert new['data']['source'] == {**before['data']['source'], 'limit': 10}
    assert {**new, 'data': {**new['data'], 'source': before['data']['source']}} == before


def test_a_merge_that_changes_an_inner_target() -> None:
    changed = config()
    (override,) = overrides.apply(
        changed,
        [('data', '{"source": {"target": "trainer.data.transforms:Keep", "keys": ("a",)}}')],
    )
    assert loading.to_plain(changed)['data']['source'] == {
        'target': 'trainer.data.transforms:Keep', 'keys': ('a',),
    }  # fmt: skip
    assert override.notes == (
        'config.data.source.split dropped: trainer.data.transforms:Keep does not take it',
    )


def test_keys_of_a_schedule_in_place_of_a_number() -> None:
    schedule = '{"target": "optax:linear_schedule", "init_value": 0.1, "end_value": 0.0}'
    new = apply_overrides(
        f'optimizer.learning_rate={schedule}',
        'optimizer.learning_rate.init_value=1',
        'optimizer.learning_rate.transition_steps=10',
    )
    assert new['optimizer']['learning_rate'] == {
        'target': 'optax:linear_schedule', 'init_value': 1.0, 'end_value': 0.0,
        'transition_steps': 10,
    }  # fmt: skip


@pytest.mark.parametrize('path', ['', 'a..b', 'a[x]', 'a.', 'a[1'])
def test_invalid_paths(path: str) -> None:
    with pytest.raises(UserError, match='not a path such as'):
        paths.parse(path)


@pytest.mark.parametrize('argv', [['--config'], ['--config.x'], ['--config.x', '--mode=eval']])
def test_missing_values(argv: list[str]) -> None:
    with pytest.raises(UserError, match=f'{argv[0]} needs a value'):
        overrides.parse_argv(argv)


def test_values_that_look_like_flags() -> None:
    assert overrides.parse_argv(
        ['one', '--config.x', '-1', '--configs=2', '--config.y=a=b', '-config.z=', 'two']
    ) == (None, [('x', '-1'), ('y', 'a=b'), ('z', '')], ['one', '--configs=2', 'two'])


@pytest.mark.parametrize(
    'assignments',
    [
        [('vars.width', '7')],
        [('vars', '{"width": 7}')],
        [('model', '{"dropout_rate": 0.5}'), ('vars.width', '7')],
        [('model.features[0]', '5'), ('vars.width', '7')],
    ],
)
def test_other_overrides_keep_references(assignments: list[tuple[str, str]]) -> None:
    changed = config_with_references()
    overrides.apply(changed, assignments)
    model = loading.to_plain(changed)['model']
    assert (model['hidden'], model['layers']) == (7, (14, {'a': 7}))
    loading.check_vars(changed)


def test_a_dict_used_in_two_places_changes_in_one(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'shared.py'
    path.write_text(
        'import ml_collections\n'
        'def get_config():\n'
        "    part = dict(target='trainer.data.mnist:MNIST', split='test')\n"
        '    config = ml_collections.ConfigDict(dict(a=dict(part=part), b=dict(part=part)))\n'
        '    config.vars = dict(width=3)\n'
        "    config.a.width = config.vars.get_ref('width')\n"
        '    return config\n'
    )
    changed = loading.load(str(path)).config
    overrides.apply(changed, [('a.part.split', 'train'), ('vars.width', '4')])
    plain = loading.to_plain(changed)
    assert plain['a']['part']['split'] == 'train'
    assert plain['b']['part']['split'] == 'test'
    assert plain['a']['width'] == 4


def test_a_path_into_a_default_object_merges_with_it() -> None:
    new = apply_overrides('mesh.model=2', 'data.loader.shuffle=false')
    assert new['mesh'] == {'data': -1, 'model': 2}
    assert new['data']['loader'] == {'target': 'trainer.data.loader:TrainLoader', 'shuffle': False}
    assert apply_overrides('mesh={"model": 4}')['mesh'] == {'data': -1, 'model': 4}


def test_a_new_evaluation_as_a_dict() -> None:
    data = {'source': {'target': 'trainer.data.mnist:MNIST', 'split': 'test'}}
    new = apply_overrides(f'evals.val={{"data": {data}}}')
    assert new['evals'] == {'val': {'data': data}}
    assert schema.read({k: v for k, v in new.items() if k != 'vars'}).evals['val'].final


def test_a_key_set_with_the_new_target_is_not_reported_as_dropped() -> None:
    (override,) = overrides.apply(
        config(), [('optimizer', '{"target": "optax:rmsprop", "momentum": 0.5}')]
    )
    assert override.notes == ()
    with pytest.raises(UserError, match=r'optimizer\.momentum: optax:adam takes no such argument'):
        apply_overrides('optimizer={"target": "optax:adam", "momentum": 0.5}')


def test_an_empty_dict_clears() -> None:
    assert apply_overrides('optimizer={}')['optimizer'] == {}
    changed = apply_overrides('evals={"a": {"data": {"source": {"target": "x:y"}}}}', 'evals={}')
    assert changed['evals'] == {}
    assert apply_overrides('data={"source": {}}')['data']['source'] == {}
    assert apply_overrides('data={"source": {}}')['data']['batch_size'] == 32


def test_an_unknown_group_is_a_typo_unless_it_gets_its_required_key() -> None:
    sgd = {'target': 'optax:sgd', 'learning_rate': 0.1}

    def change_group(path: str, value: str) -> ml_collections.ConfigDict:
        new = config()
        new.optimizer = {'groups': {'generator': {'params': 'G.*', **sgd}}}
        overrides.apply(new, [(f'optimizer.groups.{path}', value)])
        return new.optimizer.groups

    for key, value in (('loss', 'a'), ('learning_rate', '1'), ('clip_norm', '2.0')):
        with pytest.raises(UserError, match=f'Did you mean .*groups.generator.{key}\\?'):
            change_group(f'genrator.{key}', value)
    assert set(change_group('other.params', 'D.*')) == {'generator', 'other'}


@pytest.mark.parametrize('key', ['12.5%', '0.5 epochs', '1.5'])
def test_the_dot_of_a_number_is_not_a_separator(key: str) -> None:
    schedule = f'{{"target": "optax:x", "boundaries_and_scales": {{"{key}": 0.1}}}}'
    path = r'config\.optimizer\.learning_rate\.boundaries_and_scales'
    with pytest.raises(UserError, match=rf"^{path}: the key '{key}' .* whole number of steps"):
        apply_overrides(f'optimizer.learning_rate={schedule}')


def test_numpy_numbers_in_containers_from_python() -> None:
    changed = config()
    changed.vars.numbers = (0.5,) * 4
    given = (np.float64(0.1), math.inf, math.nan, np.float32(2))
    overrides.apply(changed, [('vars.numbers', overrides.from_python(given, 'vars.numbers'))])
    new = changed.vars.numbers
    assert (new[0], new[1], new[3]) == (0.1, math.inf, 2.0) and math.isnan(new[2])
    assert {type(each) for each in new} == {float}
    text = overrides.from_python({'learning_rate': np.float64(0.1)}, 'optimizer')
    rate = apply_overrides(f'optimizer={text}')['optimizer']['learning_rate']
    assert rate == 0.1 and type(rate) is float
    changed.model.scale = None  # The type is unknown.
    for number in (math.inf, -math.inf):
        overrides.apply(changed, [('model.scale', overrides.from_python(number, 'model.scale'))])
        assert changed.model.scale == number


def test_numbers_as_keys_in_an_argument() -> None:
    """Such as the boundaries of a schedule; but numbers and names do not mix."""
    schedule = '{"target": "optax:piecewise_constant_schedule", "init_value": 0.1}'
    rate = f'optimizer.learning_rate={schedule}'
    path = 'optimizer.learning_rate.boundaries_and_scales'
    new = apply_overrides(rate, f'{path}={{1000: 0.1, 2000: 0.5}}', f'{path}={{2000: 0.2}}')
    scales = new['optimizer']['learning_rate']['boundaries_and_scales']
    assert scales == {1000: 0.1, 2000: 0.2}
    with pytest.raises(UserError, match=r'expected names as the keys .*, got 1000 among names'):
        apply_overrides(rate, f'{path}={{"1 epochs": 0.1}}', f'{path}={{1000: 0.2}}')
    for wrong in ('{None: 1}', '{True: 1}', '{(1, 2): 1}'):
        with pytest.raises(UserError, match=r'expected names as the keys'):
            apply_overrides(rate, f'{path}={wrong}')


def test_an_invalid_structure_is_rejected_before_jax_is_imported() -> None:
    code = (
        'import sys\n'
        'from trainer import main\n'
        'from trainer.parallel.signals import StopRequest\n'
        'for given in (\'checkpoint={"evry": 1}\', \'guard={"nosuch": 1}\', \'seed={"a": 1}\',\n'
        '              \'hooks={"h": 3}\', \'evals={"new": {}}\', \'mesh={"data": "a"}\'):\n'
        "    for mode in ('config', 'train', 'plan'):\n"
        "        argv = ['x', '--config=configs/mnist_mlp.py', f'--config.{given}']\n"
        "        argv += [f'--mode={mode}']\n"
        '        assert main.main(argv, StopRequest()) == 2, (given, mode)\n'
        "assert not {'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)\n"
    )
    finished = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ''
    assert len(finished.stderr.splitlines()) == 18
