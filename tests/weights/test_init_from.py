# SPDX-License-Identifier: Apache-2.0
"""A run that starts from the weights of another one."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.examples import assert_same, flatten, initial_state, pretrain, trainer
from trainer.checkpoint.errors import CheckpointError
from trainer.config.errors import UserError
from trainer.weights import safetensors

FOUR = {'model__classes': 4, 'data__source__classes': 4}


@pytest.mark.slow
def test_a_checkpoint_is_loaded_onto_a_mesh(tmp_path: pathlib.Path) -> None:
    """Parameters and batch statistics are sharded as in the new run; a new optimizer."""
    path, old = pretrain(tmp_path)
    new = trainer(tmp_path, init_from={'path': path}, mesh={'fsdp': 4}, sharding=(
        {'target': 'trainer.sharding:FSDP', 'min_bytes': 64},
    ))  # fmt: skip
    state = new.init_state()
    assert_same(state.params, old.params)
    assert_same(state.collections, old.collections)
    assert flatten(state.collections)['batch_stats/backbone/BatchNorm_0/mean'].any()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    assert shardings == jax.tree.map(lambda x: x.sharding, new.set_up().programs.abstract)
    kernel = state.params['backbone']['Dense_0']['kernel']
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 3)}
    assert int(state.step) == 0
    assert not any(x.any() for x in flatten(state.opt_state).values())
    assert new.fit().step == 10


@pytest.mark.slow
def test_the_moving_average_starts_at_the_loaded_weights(tmp_path: pathlib.Path) -> None:
    path, old = pretrain(tmp_path, ema={'decay': 0.5})
    new = trainer(tmp_path, init_from={'path': path, 'ema': True}, ema={'decay': 0.9}).init_state()
    assert_same(new.params, old.ema)
    assert_same(new.ema, old.ema)
    assert (flatten(old.ema)['head/kernel'] != flatten(old.params)['head/kernel']).any()
    with pytest.raises(UserError, match=r'has no moving average: its run had no config\.ema'):
        other = trainer(tmp_path, 'plain')
        other.fit()
        path = str(tmp_path / 'plain')
        trainer(tmp_path, init_from={'path': path, 'ema': True}).init_state()


@pytest.mark.slow
def test_only_at_a_fresh_start(tmp_path: pathlib.Path) -> None:
    """A resumed run does not look for the weights that it started from."""
    path, _ = pretrain(tmp_path)
    whole = trainer(tmp_path, 'whole', init_from={'path': path}).fit()
    trainer(tmp_path, 'run', init_from={'path': path}).fit(max_steps=4)
    shutil.rmtree(path)
    end = trainer(tmp_path, 'run', init_from={'path': path}).fit()
    assert_same(end.state.params, whole.state.params)


@pytest.mark.slow
def test_steps_and_directories(tmp_path: pathlib.Path) -> None:
    """A step by its number, the newest, the best; the directory of checkpoints or of one step."""
    run = trainer(
        tmp_path, 'run', checkpoint={'every': '3 steps', 'keep_last': 9, 'best': {
            'metric': 'eval/all/loss', 'mode': 'max'}},
        evals={'all': {'every': '3 steps', 'data': {
            'source': {'target': 'tests.weights.examples:Points'}}}},
    )  # fmt: skip
    run.fit()
    at = {step: jax.device_get(run.restore(step).params) for step in (3, 6, 10)}
    path = tmp_path / 'run'

    def params(**init_from: Any) -> Any:
        return trainer(tmp_path, init_from=init_from).init_state().params

    assert_same(params(path=str(path)), at[10])
    assert_same(params(path=str(path), step=6), at[6])
    assert_same(params(path=str(path), step='6'), at[6])
    assert_same(params(path=str(path), step='best'), at[3])
    assert_same(params(path=str(path / 'checkpoints'), step=3), at[3])
    assert_same(params(path=str(path / 'checkpoints' / '3')), at[3])
    with pytest.raises(UserError, match=r"no checkpoint '7'; available: 3, 6, 9, 10"):
        params(path=str(path), step=7)
    with pytest.raises(UserError, match='no such file or directory'):
        params(path=str(path / 'nowhere'))
    with pytest.raises(UserError, match='no checkpoint in '):
        (tmp_path / 'empty').mkdir()
        params(path=str(tmp_path / 'empty'))
    plain, _ = pretrain(tmp_path)
    with pytest.raises(UserError, match=r"this run has none; set a step or 'latest'"):
        params(path=plain, step='best')


@pytest.mark.slow
def test_flax_msgpack_and_safetensors(tmp_path: pathlib.Path) -> None:
    """Files of other programs have the same weights; a shard reads a slice of a file."""
    _, old = pretrain(tmp_path)
    file = tmp_path / 'state.msgpack'
    file.write_bytes(flax.serialization.to_bytes(old.variables))
    assert_same(trainer(tmp_path, init_from={'path': str(file)}).init_state().variables,
                old.variables)  # fmt: skip
    file.write_bytes(flax.serialization.to_bytes(old))
    assert_same(trainer(tmp_path, init_from={'path': str(file)}).init_state().variables,
                old.variables)  # fmt: skip
    tensors = tmp_path / 'state.safetensors'
    for separator in '/.':
        named = {k.replace('/', separator): x for k, x in flatten(old.variables).items()}
        safetensors.write(tensors, named)
        new = trainer(tmp_path, init_from={'path': str(tensors)}, mesh={'fsdp': 4}, sharding=(
            {'target': 'trainer.sharding:FSDP', 'min_bytes': 64},
        )).init_state()  # fmt: skip
        assert_same(new.variables, old.variables)
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(UserError, match='is not a safetensors file or is damaged'):
        trainer(tmp_path, init_from={'path': str(tensors)}).init_state()
    file.write_bytes(b'no msgpack')
    with pytest.raises(UserError, match='is not a msgpack file of Flax'):
        trainer(tmp_path, init_from={'path': str(file)}).init_state()


@pytest.mark.slow
def test_floats_are_cast_to_the_dtype_of_the_model(tmp_path: pathlib.Path) -> None:
    path, old = pretrain(tmp_path)
    half = trainer(tmp_path, init_from={'path': path}, precision={'params': 'bfloat16'})
    assert_same(
        half.init_state().params, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), old.params)
    )
    tensors = tmp_path / 'half.safetensors'
    arrays = {path: x.astype(jnp.bfloat16) for path, x in flatten(old.variables).items()}
    safetensors.write(tensors, arrays)
    new = trainer(tmp_path, init_from={'path': str(tensors)}).init_state()
    assert flatten(new.params)['head/kernel'].dtype == np.float32
    assert_same({p: x.astype('f4') for p, x in arrays.items()}, new.variables)


@pytest.mark.slow
def test_another_head(tmp_path: pathlib.Path) -> None:
    """An error names arrays that do not fit, unless they are excluded."""
    path, old = pretrain(tmp_path)
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, init_from={'path': path}, **FOUR).init_state()
    assert 'params/head/kernel: got float32[12, 3], the model has float32[12, 4]' in str(
        caught.value
    )
    assert 'config.init_from.exclude' in str(caught.value)
    fresh = trainer(tmp_path, **FOUR).init_state()
    new = trainer(tmp_path, init_from={'path': path, 'exclude': 'head/.*'}, **FOUR).init_state()
    assert_same(new.params['head'], fresh.params['head'])
    assert_same(new.params['backbone'], old.params['backbone'])
    assert_same(new.collections, old.collections)
    only = {'path': path, 'include': ('backbone/Dense_.*', 'backbone/BatchNorm_0/(mean|var)')}
    new = trainer(tmp_path, init_from=only, **FOUR).init_state()
    assert_same(new.params['backbone']['Dense_1'], old.params['backbone']['Dense_1'])
    assert_same(new.params['backbone']['BatchNorm_0'], fresh.params['backbone']['BatchNorm_0'])
    assert_same(new.collections, old.collections)


@pytest.mark.slow
def test_rename(tmp_path: pathlib.Path) -> None:
    """A checkpoint with other names, here a bare backbone."""
    _, old = pretrain(tmp_path)
    file = tmp_path / 'backbone.msgpack'
    named = {
        name: {f'layer_{k}': x for k, x in tree['backbone'].items()}
        for name, tree in old.variables.items()
    }
    file.write_bytes(flax.serialization.to_bytes(named))
    init_from = {'path': str(file), 'exclude': 'head/.*', 'rename': (('^layer_', 'backbone/'),)}
    new = trainer(tmp_path, init_from=init_from).init_state()
    assert_same(new.params['backbone'], old.params['backbone'])
    assert_same(new.collections, old.collections)
    for rename, message in (
        ((('^stage_', 'backbone/'),), r'the pattern .\^stage_. changes no path of the checkpoint'),
        ((('.*', 'x'),), 'several arrays get the path'),
        ((('^layer_', r'\3'),), 'invalid group reference'),
        ((('(', ''),), 'is not a regular expression'),
        (
            (('^layer_', 'spine/'),),
            r'Missing:\n  batch_stats/backbone/BatchNorm_0/mean: float32\[12\]',
        ),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, init_from={**init_from, 'rename': rename}).init_state()


@pytest.mark.slow
def test_missing_arrays(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error by default; `on_missing='init'` keeps initial values, with a warning."""
    _, old = pretrain(tmp_path)
    file = tmp_path / 'params.msgpack'
    file.write_bytes(flax.serialization.to_bytes({**old.params, 'old_head': jnp.ones(3)}))
    with pytest.raises(UserError, match=r'Missing:\n  batch_stats/backbone/BatchNorm_0/mean'):
        trainer(tmp_path, init_from={'path': str(file)}).init_state()
    caplog.clear()
    new = trainer(tmp_path, init_from={'path': str(file), 'on_missing': 'init'}).init_state()
    assert_same(new.params, old.params)
    assert not flatten(new.collections)['batch_stats/backbone/BatchNorm_0/mean'].any()
    assert 'missing arrays that keep their initial values (2):\n' in caplog.text
    assert (
        'ignored arrays that are not in the model (1):\n' in caplog.text
        and 'old_head' in caplog.text
    )


def test_patterns_that_match_nothing(tmp_path: pathlib.Path) -> None:
    path, _ = pretrain(tmp_path)
    for key in ('include', 'exclude'):
        with pytest.raises(UserError, match=f"{key}: the pattern 'haed/.*' matches nothing"):
            trainer(tmp_path, init_from={'path': path, key: 'haed/.*'}).init_state()
    with pytest.raises(UserError, match=r'mean config\.init_from\.include'):
        trainer(tmp_path, init_from={'path': path, 'incude': '.*'})
    with pytest.raises(UserError, match=r'flatten is for PyTorch only'):
        trainer(tmp_path, init_from={'path': path, 'flatten': (('x', (1, 2, 3)),)})
    torch = tmp_path / 'torch.safetensors'
    safetensors.write(torch, {'head.weight': np.ones((3, 12), 'f4')})
    torch_head = {'path': str(torch), 'layout': 'torch', 'on_missing': 'init'}
    with pytest.raises(
        UserError, match=r'^config\.init_from\.flatten: head has 12 inputs, .* \(2, 3, 1\)'
    ):
        init_from = {**torch_head, 'flatten': (('head', (2, 3, 1)),)}
        trainer(tmp_path, init_from=init_from).init_state()
    with pytest.raises(UserError, match=r"names of PyTorch: set config\.init_from\.layout='torch'"):
        trainer(tmp_path, init_from={'path': str(torch)}).init_state()
    pairs = r'rename\[0\]: expected \(pattern, replacement\) pairs'
    for ref in ('flax.linen:relu', 'builtins:__name__'):
        with pytest.raises(UserError, match=pairs):
            trainer(tmp_path, init_from={'path': path, 'rename': ({'ref': ref},)})
    with pytest.raises(UserError, match=r'HUGING_FACE'):
        ref = {'ref': 'trainer.models.bert:HUGING_FACE'}
        trainer(tmp_path, init_from={'path': path, 'rename': (ref,)})
    with pytest.raises(UserError, match=r"optimizer is not supported with layout='torch'"):
        trainer(tmp_path, init_from={'path': path, 'layout': 'torch', 'optimizer': True})


def test_a_damaged_checkpoint(tmp_path: pathlib.Path) -> None:
    path, _ = pretrain(tmp_path)
    for file in (tmp_path / 'pretrained' / 'checkpoints').glob('10/state/**/d/*'):
        file.write_bytes(b'')
    with pytest.raises(CheckpointError, match='cannot be read'):
        trainer(tmp_path, init_from={'path': path}).init_state()


@pytest.mark.slow
def test_frozen_backbone_and_new_head(tmp_path: pathlib.Path) -> None:
    """After 50 steps the backbone is the loaded one, bit for bit; the head learns."""
    path, old = pretrain(tmp_path)
    run = trainer(
        tmp_path, 'tuned', train_for='50 steps',
        init_from={'path': path, 'exclude': 'head/.*'}, optimizer__freeze='backbone/.*',
        ema={'decay': 0.999}, **FOUR,
    )  # fmt: skip
    start = jax.device_get(run.init_state())
    end = jax.device_get(run.fit().state)
    assert_same(end.params['backbone'], old.params['backbone'])
    assert_same(end.ema['backbone'], old.params['backbone'])
    # Batch statistics are no parameters: they move, unless they are frozen too.
    mean = 'batch_stats/backbone/BatchNorm_0/mean'
    assert (flatten(end.collections)[mean] != flatten(old.collections)[mean]).all()
    assert (end.params['head']['kernel'] != start.params['head']['kernel']).any()
    shapes = sorted(x.shape for x in flatten(end.opt_state).values() if x.ndim)
    assert shapes == [(4,), (4,), (12, 4), (12, 4)]  # Adam's moments, of the head alone


@pytest.mark.slow
def test_differential_learning_rates_from_loaded_weights(tmp_path: pathlib.Path) -> None:
    """With plain SGD the first update of the backbone is a tenth of what it would be."""
    path, old = pretrain(tmp_path)
    common = {'init_from': {'path': path}, 'optimizer__target': 'optax:sgd', 'train_for': '1 step'}
    slow = trainer(
        tmp_path, **common,
        optimizer__lr_multipliers=(('backbone/.*', 0.1), ('.*', 1.0)),
    ).fit().state  # fmt: skip
    fast = trainer(tmp_path, **common).fit().state

    def movement(state: Any, part: str) -> np.ndarray:
        return flatten(state.params)[part] - flatten(old.params)[part]

    part = 'backbone/Dense_1/kernel'
    np.testing.assert_allclose(movement(slow, part), 0.1 * movement(fast, part), atol=1e-7)
    np.testing.assert_array_equal(movement(slow, 'head/kernel'), movement(fast, 'head/kernel'))
    assert movement(fast, part).any()


@pytest.mark.slow
def test_the_moments_of_adam_are_loaded_on_request(tmp_path: pathlib.Path) -> None:
    """With the count that belongs to them, but not the count of a schedule."""
    schedule = {'target': 'optax:linear_schedule', 'init_value': 0.1, 'end_value': 0.0,
                'transition_steps': '100%'}  # fmt: skip
    path, old = pretrain(tmp_path, optimizer__learning_rate=schedule)
    init_from = {'path': path, 'exclude': 'head/.*', 'optimizer': True}
    run = trainer(tmp_path, init_from=init_from, optimizer__learning_rate=schedule, **FOUR)
    state = run.init_state()
    adam, scheduled = state.opt_state[0], state.opt_state[-1]
    assert_same(adam.mu['backbone'], old.opt_state[0].mu['backbone'])
    assert_same(adam.nu['backbone'], old.opt_state[0].nu['backbone'])
    assert not adam.mu['head']['kernel'].any()
    assert (int(adam.count), int(scheduled.count), int(state.step)) == (10, 0, 0)
    assert int(old.opt_state[-1].count) == 10
    assert run.fit().step == 10
    with pytest.raises(UserError, match=r'Missing:\n  opt_state\.0\.trace/'):
        trainer(
            tmp_path, init_from={'path': path, 'optimizer': True},
            optimizer={'target': 'optax:sgd', 'learning_rate': 0.1, 'momentum': 0.9},
        ).init_state()  # fmt: skip


@pytest.mark.slow
def test_moments_of_a_differently_nested_optimizer(tmp_path: pathlib.Path) -> None:
    """Unfrozen or clipped: trained parameters keep their moments, others have none."""
    path, old = pretrain(tmp_path, optimizer__freeze='backbone/.*')
    run = trainer(tmp_path, optimizer__clip_norm=1.0)
    with pytest.raises(UserError, match=r'Missing:\n  opt_state\.1\.0\.mu/backbone/') as caught:
        initial_state(run, path=path, optimizer=True)
    assert 'mu/head' not in str(caught.value) and 'count' not in str(caught.value)
    state = initial_state(run, path=path, optimizer=True, on_missing='init')
    adam = state.opt_state[1][0]
    before = old.opt_state.inner_states['trained'].inner_state[0]
    for moments, others in ((adam.mu, before.mu), (adam.nu, before.nu)):
        assert_same(moments['head'], others['head'])
        assert not any(x.any() for x in flatten(moments['backbone']).values())
    assert int(adam.count) == 10


@pytest.mark.slow
def test_the_summary_says_where_weights_come_from(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = pretrain(tmp_path)
    capsys.readouterr()
    trainer(tmp_path, init_from={'path': path}).fit()
    assert f'starting from scratch, with weights from {path}' in capsys.readouterr().out
