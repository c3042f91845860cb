# SPDX-License-Identifier: Apache-2.0
"""Ensembles that start from other weights, and runs that start from a member of one."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tests.weights.examples import assert_same, flatten, pretrain, trainer
from trainer.config.errors import UserError
from trainer.ensemble.step import member_state

RATES = (1e-2, 1e-3)
SWEEP: dict[str, Any] = {'size': 2, 'vary': {'optimizer': {'learning_rate': RATES}}}
MESH = {'ensemble': 2, 'data': -1}


@pytest.mark.slow
def test_all_members_start_from_one_checkpoint(tmp_path: pathlib.Path) -> None:
    """Members differ in what is not loaded; each one trains as a single run does."""
    path, old = pretrain(tmp_path)
    init_from = {'path': path, 'exclude': 'head/.*'}
    # The bias before a normalisation has a gradient of mere rounding, which Adam would follow.
    sgd = {'target': 'optax:sgd', 'momentum': 0.9}
    options: dict[str, Any] = {'init_from': init_from, 'data__seed': 0, 'optimizer': sgd}
    sweep = trainer(tmp_path, ensemble=SWEEP, mesh=MESH, ema={'decay': 0.9}, **options)
    first = sweep.init_state()
    shardings = jax.tree.map(lambda x: x.sharding, first)
    assert shardings == jax.tree.map(lambda x: x.sharding, sweep.set_up().programs.abstract)
    members = [member_state(first, index) for index in range(2)]
    for member in members:
        assert_same(member.params['backbone'], old.params['backbone'])
        assert_same(member.collections, old.collections)
        assert_same(member.ema, member.params)
    kernels = [np.asarray(member.params['head']['kernel']) for member in members]
    assert (kernels[0] != kernels[1]).all()

    last = sweep.fit().state
    for index, rate in enumerate(RATES):
        alone = (
            trainer(
                tmp_path, seed=index, **{**options, 'optimizer': {**sgd, 'learning_rate': rate}}
            )
            .fit()
            .state
        )
        found, expected = flatten(member_state(last, index).params), flatten(alone.params)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_surgery_of_the_weights_of_all_members(tmp_path: pathlib.Path) -> None:
    path, old = pretrain(tmp_path)
    size: dict[str, Any] = {'model__classes': 4, 'data__source__classes': 4}
    resize = {'target': 'trainer.weights:Resize', 'pattern': 'head/.*', 'size': 4}
    run = trainer(
        tmp_path, ensemble={'size': 2}, init_from={'path': path}, surgery=(resize,), **size
    )
    kernels = np.asarray(run.init_state().params['head']['kernel'])
    np.testing.assert_array_equal(kernels[0][:, :3], flatten(old.params)['head/kernel'])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    with pytest.raises(
        UserError,
        match=r'config\.surgery is not supported for the initial weights of several members',
    ):
        trainer(tmp_path, ensemble={'size': 2}, surgery=(resize,), **size)


@pytest.mark.slow
def test_a_run_starts_from_one_member(tmp_path: pathlib.Path) -> None:
    """With its optimizer slots, if both optimizers are of the same kind."""
    path, old = pretrain(tmp_path, ensemble={'size': 3})
    init_from = {'path': path, 'member': 2, 'optimizer': True}
    state = trainer(tmp_path, init_from=init_from).init_state()
    member = member_state(old, 2)
    assert_same(state.params, member.params)
    assert_same(state.collections, member.collections)
    assert_same(state.opt_state, member.opt_state)

    def error_of(**init_from: Any) -> pytest.ExceptionInfo[UserError]:
        with pytest.raises(UserError) as error:
            trainer(tmp_path, init_from=init_from).init_state()
        return error

    assert error_of(path=path, member=3).match('the ensemble has the members 0 to 2')
    assert error_of(path=path).match('the 3 members of an ensemble: select one')
    assert error_of(path=path, member=0, layout='torch').match(
        r'member is not supported with layout='
    )
    alone = tmp_path / 'alone'
    alone.mkdir()
    path, _ = pretrain(alone)
    assert error_of(path=path, member=0).match('the checkpoint is not one of an ensemble')
