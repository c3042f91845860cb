# SPDX-License-Identifier: Apache-2.0
"""The rules of `config.sharding`, one parameter at a time.

Whether to name mesh axes or to have rules for names of one's own, is guidance: both ways are
tested (`test_names_that_are_mesh_axes_need_no_rules`, `test_the_loss_curve_is_that_of_one_device`
of `test_mesh`), and there is nothing else to assert.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from trainer.config.errors import UserError
from trainer.parallel.mesh import make_mesh
from trainer.parallel.sharding import (
    FSDP,
    ByName,
    ByPath,
    Parameter,
    Replicated,
    check_rules,
    choose_spec,
    logical_rules,
    param_specs,
)


def parameter(*shape, path='a/kernel', names=None):
    return Parameter(path, shape, itemsize=4, names=names)


@pytest.fixture(scope='module')
def mesh():
    return make_mesh({'data': 2, 'fsdp': 2, 'model': 2})


def test_fsdp_shards_the_largest_divisible_dimension(mesh):
    fsdp = FSDP(min_bytes=0)
    assert fsdp(parameter(4, 8), mesh) == P(None, 'fsdp')
    assert fsdp(parameter(4, 9), mesh) == P('fsdp')
    assert fsdp(parameter(8, 8), mesh) == P(None, 'fsdp')
    assert FSDP(axis=('fsdp', 'model'), min_bytes=0)(parameter(6, 4), mesh) == P(
        None, ('fsdp', 'model')
    )


def test_fsdp_leaves_small_and_indivisible_parameters_to_the_next_rule(mesh):
    assert FSDP(min_bytes=129)(parameter(4, 8), mesh) is None
    assert FSDP(min_bytes=128)(parameter(4, 8), mesh) == P(None, 'fsdp')
    assert FSDP(min_bytes=0)(parameter(3, 5), mesh) is None
    assert FSDP(min_bytes=0)(parameter(), mesh) is None
    by_path = ByPath(rules=(('.*', ('data',)),))
    assert choose_spec(parameter(2, 3), (FSDP(min_bytes=1000), by_path), mesh) == P('data')
    assert choose_spec(parameter(2, 3), (FSDP(min_bytes=1000),), mesh) == P()


def test_the_first_rule_with_a_spec_decides(mesh):
    rules = (
        ByPath(rules=(('.*/bias', ()), ('mlp/.*', (None, 'model')), ('mlp/kernel', ('data',)))),
        Replicated(),
        FSDP(min_bytes=0),
    )
    assert choose_spec(parameter(4, path='mlp/bias'), rules, mesh) == P()
    assert choose_spec(parameter(4, 4, path='mlp/kernel'), rules, mesh) == P(None, 'model')
    assert choose_spec(parameter(4, 4, path='other/kernel'), rules, mesh) == P()


def test_j8_names_take_each_mesh_axis_once_in_order_of_the_rules():
    mesh = make_mesh({'X': 2, 'Y': 2, 'Z': 2})
    rules = ByName(rules=(('batch', 'X'), ('features', 'X'), ('heads', 'Y'), ('batch', 'Z')))
    names = ('batch', 'length', 'heads', 'features')
    assert rules(parameter(4, 4, 4, 4, names=names), mesh) == P('X', None, 'Y', None)


def test_names_without_a_rule_and_parameters_without_names(mesh):
    rules = ByName(rules=(('mlp', 'model'), ('embed', ('data', 'fsdp'))))
    assert rules(parameter(4, 4, names=('other', 'mlp')), mesh) == P(None, 'model')
    assert rules(parameter(4, 4, names=('embed', 'mlp')), mesh) == P(('data', 'fsdp'), 'model')
    assert rules(parameter(4, 4), mesh) is None
    assert logical_rules((FSDP(), rules)) == (('mlp', 'model'), ('embed', ('data', 'fsdp')))


@pytest.mark.parametrize(
    ('rule', 'expected'),
    [
        (ByPath(rules=(('.*', ('modle',)),)), "'modle', but the axes of config.mesh are data, fsd"),
        (
            ByPath(rules=(('.*', (None, None, 'model')),)),
            'has axes for 3 dimensions, but a/kernel has',
        ),
        (ByPath(rules=(('.*', ('model', 'model')),)), 'uses a mesh axis twice in a/kernel'),
        (ByPath(rules=(('.*', (None, 'model')),)), 'dimension 1 of a/kernel (4, 3) over'),
        (ByName(rules=(('b', ('data', 'model')),)), '3 is not divisible by 4'),
        (FSDP(axis='nowhere'), "FSDP names the mesh axis 'nowhere'"),
    ],
)
def test_impossible_specs_are_named(mesh, rule, expected):
    with pytest.raises(UserError) as error:
        choose_spec(parameter(4, 3, names=('a', 'b')), (rule,), mesh)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: ByPath(rules=(('a(', ()),)), "'a(' is not a regular expression: missing )"),
        (lambda: ByPath(rules=(('.*', 'model'),)), "as in (None, 'model'); got 'model'"),
        (lambda: ByPath(rules=(('.*',),)), "a rule is a pair such as ('mlp', 'model')"),
        (lambda: ByName(rules=('mlp',)), "got 'mlp'"),
    ],
)
def test_invalid_rules_are_named(make, expected):
    with pytest.raises(UserError) as error:
        make()
    assert expected in str(error.value)


@pytest.mark.parametrize('rule', [ByPath(rules=(('z', ('x',)),)), ByName(rules=(('z', 'x'),))])
def test_axes_of_unused_rules_must_exist_too(mesh, rule):
    with pytest.raises(UserError, match="'z' names the mesh axis 'x', but the axes of config"):
        check_rules((rule,), mesh)


def test_a_pattern_that_matches_nothing_is_named(mesh):
    params = {'dense': {'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    rules = (Replicated(), ByPath(rules=(('dense', ('model',)),)))
    with pytest.raises(UserError, match=r"'dense' matches no parameter.* such as dense/kernel"):
        param_specs(params, {'dense': {'kernel': P()}}, rules, mesh)


def test_trees_of_parameters(mesh):
    params = {
        'dense': {'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32)},
        'named': jax.ShapeDtypeStruct((4, 8), jnp.float32),
    }
    names = {'dense': {'kernel': P()}, 'named': P('embed', 'mlp')}
    rules = (ByName(rules=(('embed', 'data'),)), FSDP(min_bytes=0))
    specs = param_specs(params, names, rules, mesh)
    assert specs == {'dense': {'kernel': P(None, 'fsdp')}, 'named': P('data', None)}
