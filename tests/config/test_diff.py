# SPDX-License-Identifier: Apache-2.0
"""Origins of values that overrides set, differences of configs, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import ml_collections
import pytest

from tests.command import ROOT
from trainer.config import diff, loading, overrides, show

SCHEDULE = '{"target": "optax:linear_schedule", "init_value": 1}'


def resolve(*assignments: tuple[str, str]) -> list[str]:
    loaded = loading.load(str(ROOT / 'configs' / 'mnist.py'))
    applied = overrides.apply(loaded.config, assignments)
    return show.format_resolved(loading.to_plain(loaded.config), applied).splitlines()


def override_lines(*assignments: tuple[str, str]) -> list[str]:
    return sorted(line for line in resolve(*assignments) if '  # --config.' in line)


def test_the_last_override_of_a_key_is_its_origin() -> None:
    assert override_lines(('seed', '1'), ('seed', '2')) == ['seed = 2  # --config.seed=2']


def test_an_override_with_the_same_value_is_shown() -> None:
    assert override_lines(('seed', '0')) == ['seed = 0  # --config.seed=0']


def test_an_override_moves_a_default_to_the_config() -> None:
    lines = resolve(('data.shuffle', 'false'))
    assert [line for line in lines if line.startswith('data.shuffle ')] == [
        'data.shuffle = False  # --config.data.shuffle=false'
    ]


def test_a_merge_is_the_origin_of_only_what_it_changes() -> None:
    text = '{"source": {"split": "test"}, "batch_size": 32}'
    assert override_lines(('data', text)) == [f"data.source.split = 'test'  # --config.data={text}"]


def test_every_key_of_a_dict_that_replaces_a_number_has_its_origin() -> None:
    path = 'optimizer.learning_rate'
    assert override_lines((path, SCHEDULE), (f'{path}.init_value', '2')) == [
        f'{path}.init_value = 2  # --config.{path}.init_value=2',
        f"{path}.target = 'optax:linear_schedule'  # --config.{path}={SCHEDULE}",
    ]
    assert override_lines((path, SCHEDULE), (path, '2')) == [f'{path} = 2  # --config.{path}=2']


def test_every_key_of_new_objects_has_its_origin() -> None:
    text = '({"target": "trainer.data.transforms:OneHot", "num_classes": 3}, {"target": "a:b"})'
    assert override_lines(('data.transforms', text)) == [
        f'data.transforms[0].num_classes = 3  # --config.data.transforms={text}',
        "data.transforms[0].target = 'trainer.data.transforms:OneHot'"
        f'  # --config.data.transforms={text}',
        f"data.transforms[1].target = 'a:b'  # --config.data.transforms={text}",
    ]


def test_an_index_from_the_end_has_its_origin() -> None:
    assert override_lines(('data.device_transforms[-1].key', 'x')) == [
        "data.device_transforms[0].key = 'x'  # --config.data.device_transforms[-1].key=x"
    ]


def test_elements_of_a_tuple_have_their_origins() -> None:
    pairs, one = '((".*kernel", 0.5), (".*", 1.0))', 'optimizer.lr_multipliers[1][1]'
    assert override_lines(('optimizer.lr_multipliers', pairs), (one, '2')) == [
        "optimizer.lr_multipliers = (('.*kernel', 0.5), ('.*', 2.0))  "
        f'# --config.optimizer.lr_multipliers={pairs}, --config.{one}=2'
    ]
    loaded = loading.load(str(ROOT / 'configs' / 'mnist_mlp.py'))
    applied = overrides.apply(loaded.config, [('model.features[0]', '7')])
    lines = show.format_resolved(loading.to_plain(loaded.config), applied).splitlines()
    assert 'model.features = (7, 10)  # --config.model.features[0]=7' in lines


def test_defaults_next_to_overrides_are_shown_as_defaults() -> None:
    lines = [line for line in resolve(('mesh.model', '2')) if line.startswith('mesh')]
    assert lines == ['mesh.data = -1  # default', 'mesh.model = 2  # --config.mesh.model=2']


def help_rows() -> list[list[str]]:
    """Returns the words of each line of `--helpconfig` with a key."""
    config = loading.to_plain(loading.load(str(ROOT / 'configs' / 'mnist.py')).config)
    lines = show.format_helpconfig(config).replace('\n    = ', ' ').splitlines()
    return [line.split() for line in lines if line.startswith('  --config.')]


def test_help_lists_the_keys_of_optional_sections() -> None:
    rows = help_rows()
    assert ['--config.ema.decay', 'float', '(required)'] in rows
    assert ['--config.checkpoint.best.mode', 'max|min', 'or', 'None', 'None'] in rows


def test_unchecked_arguments_are_marked() -> None:
    lines = show.format_resolved({'x': {'target': 'a:b', 'accepts_any': True}}, ()).splitlines()
    assert 'x.accepts_any = True  # arguments are not checked' in lines
    assert "x.target = 'a:b'" in lines


def test_help_has_each_key_once_with_type_and_value() -> None:
    rows = help_rows()
    keys = [row[0] for row in rows]
    assert len(keys) == len(set(keys))
    assert ['--config.train_for', 'duration', "'10", "epochs'"] in rows
    assert ['--config.data.batch_size', 'int', '32'] in rows
    assert ['--config.data.remainder', 'carry|pad|drop', "'carry'"] in rows
    assert ['--config.checkpoint.keep_every', 'duration', "'never'"] in rows
    assert ['--config.model.num_classes', 'int', '10'] in rows
    assert ['--config.ensemble.vary', 'dict[str,', 'object]', '{}'] in rows


def round_trip(config: Any) -> Any:
    return diff.from_jsonable(json.loads(json.dumps(diff.to_jsonable(config))))


@pytest.mark.parametrize(
    'config',
    [
        {'a': ()},
        {'a': ((), [()], {})},
        {'pairs': (('a', 1), ('b', 2.0)), 'deep': [{'x': ({'y': (None, True)},)}]},
        {'text': '(1, 2)', 'number': 1e-300, 'large': 10**20},
    ],
)
def test_json_distinguishes_tuples_and_lists(config: Any) -> None:
    back = round_trip(config)
    assert back == config
    assert diff.diff(config, back) == []
    assert repr(back) == repr(config)


def test_to_jsonable_rejects_other_types() -> None:
    with pytest.raises(
        TypeError, match='expected a dict, tuple, list, number, string or None, got'
    ):
        diff.to_jsonable({'a': object()})


def test_int_keys_equal_their_saved_strings() -> None:
    config = {'boundaries_and_scales': {1000: 0.1, 2000: 0.5}}
    saved = round_trip(config)
    assert diff.diff(saved, config) == []
    assert diff.diff(saved, {'boundaries_and_scales': {1000: 0.2, 2000: 0.5}}) == [
        diff.Change('boundaries_and_scales.1000', 0.1, 0.2)
    ]


def test_differences_inside_nested_tuples() -> None:
    old = {'a': (1, (2, (3, 4))), 'b': [{'c': (5,)}]}
    new = {'a': (1, (2, (3, 9))), 'b': [{'c': (6,)}]}
    assert diff.diff(old, new) == [
        diff.Change('a[1][1][1]', 4, 9),
        diff.Change('b[0].c[0]', 5, 6),
    ]


@pytest.mark.parametrize(
    ('old', 'new'), [((1, 2), (1, 2, 3)), ((1, 2), [1, 2]), (1, True), (1, 1.0), ({}, None)]
)
def test_values_of_other_types_or_lengths_differ_as_a_whole(old: Any, new: Any) -> None:
    assert diff.diff({'a': {'b': old}}, {'a': {'b': new}}) == [diff.Change('a.b', old, new)]


def test_differences_are_aligned() -> None:
    changes = diff.diff({'a': 1, 'long': {'name': 'x'}}, {'a': 2, 'long': {}})
    assert diff.format_diff(changes).splitlines() == [
        '  a          1 -> 2',
        "  long.name  'x' -> '(absent)'",
    ]


def test_nan_equals_itself() -> None:
    assert diff.diff({'a': float('nan')}, {'a': float('nan')}) == []
    assert len(diff.diff({'a': float('nan')}, {'a': 1.0})) == 1


def config_with_shared_references() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.vars = {'rate': 0.1, 'n': 4}
    config.optimizer = {'target': 'optax:sgd', 'learning_rate': config.vars.get_ref('rate')}
    config.seed = config.vars.get_ref('n') * 2
    return config


@pytest.mark.parametrize(
    ('assignments', 'origins'),
    [
        ([('vars.rate', '0.5')], {'vars.rate': 0, 'optimizer.learning_rate': 0}),
        # A reference is set through every key that shares it; the last override sets them all.
        (
            [('optimizer.learning_rate', '0.3'), ('vars.rate', '0.5')],
            {'vars.rate': 1, 'optimizer.learning_rate': 1},
        ),
        (
            [('vars.rate', '0.5'), ('optimizer.learning_rate', '0.3')],
            {'vars.rate': 1, 'optimizer.learning_rate': 1},
        ),
        (
            [('optimizer.learning_rate', '0.5'), ('vars.rate', '0.5')],
            {'vars.rate': 1, 'optimizer.learning_rate': 1},
        ),
        # A computed reference follows its input, until it is set itself.
        ([('vars.n', '5')], {'vars.n': 0, 'seed': 0}),
        ([('vars.n', '5'), ('seed', '7')], {'vars.n': 0, 'seed': 1}),
        ([('seed', '7'), ('vars.n', '5')], {'vars.n': 1, 'seed': 0}),
    ],
)
def test_values_of_a_shared_reference_have_the_override_as_their_origin(
    assignments: list[tuple[str, str]], origins: dict[str, int]
) -> None:
    config = config_with_shared_references()
    applied = overrides.apply(config, assignments)
    lines = show.format_resolved(loading.to_plain(config), applied).splitlines()
    found = dict(line.split('  # --config.') for line in lines if '  # --config.' in line)
    actual = {text.split(' = ')[0]: origin for text, origin in found.items()}
    assert actual == {path: '='.join(assignments[i]) for path, i in origins.items()}
