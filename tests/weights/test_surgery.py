# SPDX-License-Identifier: Apache-2.0
"""Operations on parameters and their slots in the optimizer."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.weights.examples import assert_same, flatten, pretrain, trainer
from trainer.config.errors import UserError
from trainer.models.cnn import CNN
from trainer.weights.surgery import Edit, Interpolate, Rename, Resize, operate

OPERATION = 'trainer.weights.surgery'
PARAMS = {
    'Conv_0': {'kernel': jnp.arange(8.0).reshape(2, 4), 'bias': jnp.ones(4)},
    'Dense_1': {'kernel': jnp.arange(12.0).reshape(4, 3) + 1, 'bias': jnp.arange(3.0)},
}


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x)


def double(x: Any) -> Any:
    return 2 * x


def train_one_step(params: Any) -> tuple[Any, Any]:
    """Returns an Adam and its state after one step, all moments different from zero."""
    tx = optax.adam(0.1)
    return tx, tx.update(jax.tree.map(lambda x: x + 1, params), tx.init(params), params)[1]


@pytest.mark.slow
def test_edit_one_parameter() -> None:
    """Of the CNN's 8 arrays the norm of one kernel becomes 1; everything else stays."""
    cnn = CNN(hidden=16).init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))['params']
    tx, opt_state = train_one_step(cnn)
    params, slots = operate([Edit(pattern='Dense_1/kernel', function=unit)], cnn, opt_state, tx)
    assert np.linalg.norm(params['Dense_1']['kernel']) == pytest.approx(1)
    rest = {path: x for path, x in flatten(params).items() if path != 'Dense_1/kernel'}
    assert_same(rest, {path: flatten(cnn)[path] for path in rest})
    assert_same(slots, opt_state)
    assert len(rest) == 7


def test_optimizer_state_is_edited_too() -> None:
    """Its tuples stay, its moments change with their parameters, and training continues."""
    tx, opt_state = train_one_step(PARAMS)
    operations = [
        Rename(pattern='^Dense_1/', replacement='head/'),
        Resize(pattern='head/(kernel|bias)', size=5, fill=7.0),
    ]
    params, slots = operate(operations, PARAMS, opt_state, tx)
    old = opt_state[0]
    np.testing.assert_array_equal(params['head']['kernel'][:, :3], PARAMS['Dense_1']['kernel'])
    assert (params['head']['kernel'][:, 3:] == 7).all()
    np.testing.assert_array_equal(slots[0].mu['head']['kernel'][:, :3], old.mu['Dense_1']['kernel'])
    assert not slots[0].nu['head']['kernel'][:, 3:].any()
    assert slots[0].count == 1
    assert jax.tree.structure(slots) == jax.tree.structure(tx.init(params))
    shapes = jax.tree.map(jnp.shape, tx.init(params))
    assert jax.tree.map(jnp.shape, slots) == shapes
    grads = jax.tree.map(jnp.ones_like, params)
    _, after = tx.update(grads, slots, params)
    assert after[0].count == 2


def parts(params: Any) -> Any:
    return {name: 'frozen' if name == 'Conv_0' else 'trained' for name in params}


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


@pytest.mark.parametrize(
    'tx',
    [
        optax.multi_transform({'trained': optax.adam(0.1), 'frozen': optax.set_to_zero()}, parts),
        optax.masked(optax.adam(0.1), matrices),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, mask=matrices)),
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    ],
    ids=['frozen', 'masked', 'chain', 'accumulated'],
)
def test_states_of_masked_optimizers(tx: Any) -> None:
    """The structure is that of `tx.init`, and training continues."""
    grads = jax.tree.map(lambda x: x + 1, PARAMS)
    opt_state = tx.update(grads, tx.init(PARAMS), PARAMS)[1]
    operations = [
        Rename(pattern='^Dense_1/', replacement='head/'),
        Resize(pattern='head/(kernel|bias)', size=5, fill=7.0),
    ]
    params, slots = operate(operations, PARAMS, opt_state, tx)
    wanted = tx.init(params)
    assert jax.tree.structure(slots) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, slots) == jax.tree.map(jnp.shape, wanted)
    path = next(path for path in flatten(slots) if path.endswith('mu/head/kernel'))
    old = flatten(opt_state)[path.replace('head', 'Dense_1')]
    np.testing.assert_array_equal(flatten(slots)[path][:, :3], old)
    assert not flatten(slots)[path][:, 3:].any()
    after = tx.update(jax.tree.map(jnp.ones_like, params), slots, params)[1]
    assert jax.tree.structure(after) == jax.tree.structure(wanted)


def test_slots_of_other_shapes() -> None:
    """Adafactor's sums of rows and columns can be renamed, but not resized."""
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    opt_state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1]
    rename = Rename(pattern='^Dense_1/', replacement='head/')
    params, slots = operate([rename], PARAMS, opt_state, tx)
    assert jax.tree.structure(slots) == jax.tree.structure(tx.init(params))
    old = {path.replace('Dense_1', 'head'): x for path, x in flatten(opt_state).items()}
    assert_same(flatten(slots), old)
    with pytest.raises(
        UserError, match=r'differs from that of its parameter, \[4, 3\], cannot be edited'
    ):
        operate([Resize(pattern='Dense_1/kernel', size=5)], PARAMS, opt_state, tx)
    with pytest.raises(UserError, match='opt_state needs the optimizer that created it, tx='):
        operate([rename], PARAMS, opt_state)
    with pytest.raises(UserError, match='opt_state/0/trace/Conv_0/bias: got absent'):
        operate([rename], PARAMS, opt_state, optax.sgd(0.1, momentum=0.9))


def test_resize() -> None:
    kernel = {'head': {'kernel': np.arange(6.0).reshape(2, 3)}}

    def resize(**options: Any) -> Any:
        return operate([Resize(pattern='head/kernel', **options)], kernel)[0]['head']['kernel']

    assert resize(size=2).tolist() == [[0, 1], [3, 4]]
    assert resize(size=4, keep=(2, 0), fill=9.0).tolist() == [[2, 0, 9, 9], [5, 3, 9, 9]]
    assert resize(size=4, fill='mean').tolist() == [[0, 1, 2, 1], [3, 4, 5, 4]]
    assert resize(size=3, axis=0).tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    with pytest.raises(UserError, match='keep has 3 entries, more than size=2'):
        resize(size=2, keep=(0, 1, 2))
    with pytest.raises(UserError, match=r'on params/head/kernel \[2, 3\]: '):
        resize(size=2, keep=(0, 3))


def test_interpolate() -> None:
    """A line stays a line, a class token stays, a grid is resampled in both dimensions."""
    line = np.arange(4.0)[:, None] * np.ones(2)
    tables = {'positions': line}
    result, _ = operate([Interpolate(pattern='positions', size=8, method='linear')], tables)
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(result['positions'], expected[:, None] * np.ones(2), rtol=1e-6)

    grid = np.stack(np.meshgrid(np.arange(3.0), np.arange(3.0), indexing='ij'), -1).reshape(9, 2)
    tables = {'positions': np.concatenate([[[50.0, 60.0]], grid])[None]}
    operation = Interpolate(pattern='positions', size=(6, 3), extra=1, method='linear')
    table = operate([operation], tables)[0]['positions']
    assert table.shape == (1, 19, 2)
    assert table[0, 0].tolist() == [50, 60]
    down = table[0, 1:].reshape(6, 3, 2)
    np.testing.assert_allclose(down[:, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2], atol=1e-6)
    np.testing.assert_allclose(down[0, :, 1], [0, 1, 2], atol=1e-6)
    same = Interpolate(pattern='positions', size=(3, 3), extra=1)
    np.testing.assert_allclose(operate([same], tables)[0]['positions'], tables['positions'])
    with pytest.raises(UserError, match=r'10 positions are not a grid \(3, 3\)'):
        operate([Interpolate(pattern='positions', size=(3, 3))], tables)
    wide = Interpolate(pattern='positions', size=(2, 2), old_size=(2, 5))
    assert operate([wide], tables)[0]['positions'].shape == (1, 4, 2)


def test_second_moments_stay_positive() -> None:
    """Cubic interpolation would overshoot below zero, and Adam takes the square root."""
    table = {'positions': np.repeat([[0.0], [0.0], [9.0], [9.0]], 2, 1)}
    tx, opt_state = train_one_step(table)
    state = (opt_state[0]._replace(nu=table), *opt_state[1:])
    operations = [Interpolate(pattern='positions', size=12)]
    params, slots = operate(operations, table, state, tx)
    assert params['positions'].min() < -0.1
    assert slots[0].nu['positions'].min() == 0
    assert slots[0].nu['positions'].shape == (12, 2)


def test_mistakes() -> None:
    for operation, message in (
        (Rename(pattern='Dens_', replacement=''), 'matches no array. The paths are Conv_0/bias, '),
        (Rename(pattern='(', replacement=''), 'config.surgery: Rename'),
        (Rename(pattern='.*/', replacement=''), 'several arrays get the path'),
        (Resize(pattern='kernel', size=2), 'matches no array. A pattern must match a whole path'),
        (Edit(pattern='[', function=unit), 'config.surgery: Edit'),
        (Edit(pattern='.*/bias', function=lambda x: {}['a']), r"Conv_0/bias \[4\]: KeyError: 'a'"),
        (Edit(pattern='.*/bias', function=lambda x: 1 / 0), 'Conv_0/bias .*ZeroDivisionError'),
        (Edit(pattern='.*/bias', function=lambda x: None), 'expected an array of numbers, got'),
        (
            Interpolate(pattern='.*/kernel', size=6, extra=9),
            'Conv_0/kernel .* it has only 2 positions, and extra=9',
        ),
        (
            Interpolate(pattern='.*/bias', size=6),
            r'Conv_0/bias .* expected an array \(\.\.\., positions, width\)',
        ),
        (
            Rename(pattern='Dense_1/kernel', replacement='Dense_1/bias/x'),
            r'Rename\(.*\) creates params/Dense_1/bias/x below params/Dense_1/bias, which is an',
        ),
        (optax.adam(0.1), r'config\.surgery\[0\]: expected an operation .* got a Gradient'),
        (print, 'returned NoneType; expected weights by path'),
    ):
        with pytest.raises(UserError, match=message):
            operate([operation], PARAMS)


@pytest.mark.slow
def test_surgery_of_a_run(tmp_path: pathlib.Path) -> None:
    """A larger head and more positions; old entries stay, with their moments."""
    path, old = pretrain(tmp_path, model__positions=4)
    surgery = (
        {'target': f'{OPERATION}:Resize', 'pattern': 'head/(kernel|bias)', 'size': 4},
        {'target': f'{OPERATION}:Interpolate', 'pattern': 'positions', 'size': 6},
    )
    run = trainer(
        tmp_path, 'larger', init_from={'path': path, 'optimizer': True}, surgery=surgery,
        model__positions=6, model__classes=4, data__source__classes=4,
    )  # fmt: skip
    start = jax.device_get(run.init_state())
    np.testing.assert_array_equal(
        start.params['head']['kernel'][:, :3], old.params['head']['kernel']
    )
    assert not start.params['head']['kernel'][:, 3].any()
    assert_same(start.params['backbone'], old.params['backbone'])
    assert_same(start.opt_state[0].mu['backbone'], old.opt_state[0].mu['backbone'])
    mu = start.opt_state[0].mu['head']['kernel']
    np.testing.assert_array_equal(mu[:, :3], old.opt_state[0].mu['head']['kernel'])
    assert start.params['positions'].shape == start.opt_state[0].nu['positions'].shape == (6, 12)
    end = run.fit()
    assert end.step == 10
    # A resume does not operate again.
    again = trainer(
        tmp_path, 'larger', init_from={'path': path, 'optimizer': True}, surgery=surgery,
        model__positions=6, model__classes=4, data__source__classes=4, train_for='12 steps',
    )  # fmt: skip
    assert again.fit().step == 12


@pytest.mark.slow
def test_results_that_do_not_fit_the_model(tmp_path: pathlib.Path) -> None:
    path, _ = pretrain(tmp_path)
    resize = {'target': f'{OPERATION}:Resize', 'pattern': 'head/kernel', 'size': 5}
    with pytest.raises(
        UserError, match=r'head/kernel: got float32\[12, 5\], the model has float32\[12, 3\]'
    ):
        trainer(tmp_path, init_from={'path': path}, surgery=(resize,)).init_state()
    with pytest.raises(UserError, match=r'config\.surgery\[0\]\.sise'):
        trainer(tmp_path, surgery=({**resize, 'sise': 3},))
    rename = {'target': f'{OPERATION}:Rename', 'pattern': 'head', 'replacement': 'top'}
    with pytest.raises(
        UserError, match=r'^the result of config\.surgery does not .*\nMissing:\n  params/head/bias'
    ):
        trainer(tmp_path, surgery=(rename,)).init_state()


def test_surgery_of_fresh_weights(tmp_path: pathlib.Path) -> None:
    """Without a checkpoint, the moving average starts at the edited weights."""
    edit = {'target': f'{OPERATION}:Edit', 'pattern': 'head/kernel',
            'function': {'ref': f'{__name__}:double'}}  # fmt: skip
    fresh = trainer(tmp_path, ema={'decay': 0.9}).init_state()
    edited = trainer(tmp_path, ema={'decay': 0.9}, surgery=(edit,)).init_state()
    np.testing.assert_array_equal(
        edited.params['head']['kernel'], 2 * np.asarray(fresh.params['head']['kernel'])
    )
    assert_same(edited.ema, edited.params)
    assert_same(edited.params['backbone'], fresh.params['backbone'])
