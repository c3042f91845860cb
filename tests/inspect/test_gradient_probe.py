# SPDX-License-Identifier: Apache-2.0
"""Gradients of the loss with respect to intermediate values, and `--mode=grad_probe`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import command
from tests.inspect.models import build, linen, nnx_model
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.inspect.forward import Forward
from trainer.inspect.gradient_probe import Gradient, gradients
from trainer.modules.functional import as_functional
from trainer.parallel.mesh import make_mesh
from trainer.step.state import TrainState
from trainer.tasks.runner import TaskRunner
from trainer.trainer import Trainer


class Foo(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(3)(x)
        x = self.perturb('dense3', x)
        return nn.Dense(2)(x)


class NNXFoo(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.one, self.two = nnx.Linear(9, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.one(x))
        return self.two(self.perturb('hidden', x))


class Shared(nn.Module):
    """Calls one layer twice, and a module with more than one output."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(9, name='layer')
        one, two, _ = Pair(name='pair')(layer(layer(x)))
        return one[:, :2] + 3 * two[:, :2]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x, {'b': 2 * x}['b'], jnp.arange(3)


class Shapes(nn.Module):
    """Calls one layer on two rows, and on their sum."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.Dense(2, name='layer')
        return layer(x) + layer(x.sum(0, keepdims=True))[0]


def squares(model: Any, batch: Any) -> Any:
    return jnp.square(model(batch['x']) - 1.0).mean(-1)


def probe(
    make: Any, params: Any, match: tuple[str, ...] = (), task: Any = squares
) -> list[Gradient]:
    forward = Forward(
        model=as_functional(make), task=TaskRunner.from_task(task), seed=0, accumulate=1,
        mesh=make_mesh({'data': -1}), sharding=(),
    )  # fmt: skip
    state = TrainState(
        step=jnp.int32(0), params=params, opt_state=None, collections={}, metrics=None
    )
    return gradients(forward, state, {'x': jnp.ones((2, 9))}, match)


def test_the_gradient_of_a_perturbed_value() -> None:
    """The numbers of the Flax guide, with the random bits of its version."""
    with jax.threefry_partitionable(False):
        params = Foo().init(jax.random.PRNGKey(0), jnp.ones((2, 9)))['params']
    (found,) = probe(Foo(), params)
    assert (found.path, found.value_norm) == ('dense3', None)
    expected = [[-1.456924, -0.44332537, 0.02422847]] * 2
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-6)
    assert found.norm == pytest.approx(np.linalg.norm(expected))


def test_the_gradient_of_any_module_output() -> None:
    """Without a change of the model; equal to the gradient by the chain rule."""
    params = Foo().init(jax.random.key(0), jnp.ones((2, 9)))['params']
    named, hidden, last, whole = sorted(
        probe(Foo(), params, ('.*',)), key=lambda g: ('dense3', 'Dense_0', 'Dense_1').index(g.path)
        if g.path != '(model)' else 3,
    )  # fmt: skip
    output = Foo().apply({'params': params}, jnp.ones((2, 9)))
    expected = 2 * (output - 1) / output.size
    np.testing.assert_allclose(last.gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(whole.gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(hidden.gradient, expected @ params['Dense_1']['kernel'].T, rtol=1e-4)
    np.testing.assert_array_equal(named.gradient, hidden.gradient)
    assert whole.value_norm == pytest.approx(float(jnp.linalg.norm(output)), rel=1e-5)
    paths = [g.path for g in probe(Foo(), params, ('.*',))]
    assert paths == ['Dense_0', 'Dense_1', '(model)', 'dense3']  # As they are called.


def test_an_nnx_model() -> None:
    """`self.perturb` and any output."""
    model = NNXFoo(rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = {g.path: g for g in probe(model, params, ('one|two',))}
    assert set(found) == {'hidden', 'one', 'two'}
    hidden = nnx.relu(model.one(jnp.ones((2, 9))))
    last = 2 * (model.two(hidden) - 1) / 4
    at_hidden = last @ model.two.kernel[...].T
    np.testing.assert_allclose(found['two'].gradient, last, rtol=1e-5)
    np.testing.assert_allclose(found['hidden'].gradient, at_hidden, rtol=1e-5)
    np.testing.assert_allclose(found['one'].gradient, at_hidden * (hidden > 0), rtol=1e-5)
    assert set(found) > {g.path for g in probe(model, params)} == {'hidden'}


def test_gradients_of_calls_add_up_and_outputs_are_separate() -> None:
    params = Shared().init(jax.random.key(0), jnp.ones((2, 9)))['params']
    found = {g.path: g for g in probe(Shared(), params, ('layer|pair',))}
    assert set(found) == {'layer', 'pair/0', 'pair/1'}
    np.testing.assert_allclose(found['pair/1'].gradient, 3 * found['pair/0'].gradient, rtol=1e-5)
    inner = found['pair/0'].gradient + 2 * found['pair/1'].gradient
    both = inner + inner @ params['layer']['kernel'].T
    np.testing.assert_allclose(found['layer'].gradient, both, rtol=1e-4)


def test_calls_with_other_shapes_are_separate() -> None:
    params = Shapes().init(jax.random.key(0), jnp.ones((2, 9)))['params']
    found = {g.path: g for g in probe(Shapes(), params, ('layer',))}
    assert {path: g.gradient.shape for path, g in found.items()} == {
        'layer': (2, 2), 'layer#1': (1, 2),
    }  # fmt: skip
    total = found['layer'].gradient.sum(0, keepdims=True)
    np.testing.assert_allclose(found['layer#1'].gradient, total, rtol=1e-5)
    sums = jnp.full((1, 9), 2.0) @ params['layer']['kernel'] + params['layer']['bias']
    assert found['layer#1'].value_norm == pytest.approx(float(jnp.linalg.norm(sums)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('model', [linen(), nnx_model(), linen(scans=True)])
def test_the_mode(model: Any, tmp_path: pathlib.Path) -> None:
    """`--mode=grad_probe` shows a table and writes the gradients."""
    args = (
        f'--config.model={json.dumps(model)}', '--mode=grad_probe', f'--workdir={tmp_path}',
        '--match=la.*',
    )  # fmt: skip
    finished = command.run(command.MLP, *command.SMALL, *args)
    assert finished.code == 0, finished.err
    title, header, *table = finished.out.splitlines()
    assert title == 'gradients of the loss of step 1'
    assert header.split('  ')[0] == 'path' and header.endswith('norm of gradient')
    arrays = np.load(tmp_path / 'gradients_0.npz')
    assert table[-1] == str(tmp_path / 'gradients_0.npz')
    assert [line.split()[0] for line in table[:-1]] == list(arrays)
    for line in table[:-1]:
        path, *_, norm = line.split()
        assert float(norm) == pytest.approx(np.linalg.norm(arrays[path]), rel=1e-3)
    assert arrays['last'].shape == (32, 10)
    if model == linen(scans=True):
        assert arrays['layers/layer'].shape == (4, 32, 16)


@pytest.mark.slow
def test_a_checkpoint_and_several_processes(tmp_path: pathlib.Path) -> None:
    config = (f'--config.model={json.dumps(linen())}', '--config.evals={}')
    command.train(tmp_path, *config, '--config.train_for=20steps')
    for count in (1, 2):
        args = (*config, '--config.train_for=20steps', '--mode=grad_probe', '--match=last')
        (out, *_) = group.train(count, tmp_path, *args, devices=4 // count)
        assert 'gradients of the loss of step 21' in out
        found = np.load(tmp_path / 'gradients_20.npz')['last']
        before = found if count == 1 else before  # noqa: F821
        np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_no_matching_value_is_an_error() -> None:
    params = Shared().init(jax.random.key(0), jnp.ones((2, 9)))['params']
    with pytest.raises(UserError, match=r"names no value.*--match='\.\*' selects all"):
        probe(Shared(), params)
    with pytest.raises(UserError, match=r"matches 'Dense'\. A pattern must match a whole path"):
        probe(Shared(), params, ('Dense',))
    with pytest.raises(UserError, match=r"--match: '\(' is not a regular expression"):
        probe(Shared(), params, ('(',))
    closed = {'target': 'tests.modules.test_intermediates:Stack', 'kind': 'scan'}
    made = build(closed, task={'ref': 'tests.inspect.test_capture:square'})
    trainer = Trainer(made)
    forward = Forward.from_experiment(made, trainer.set_up().mesh)
    with trainer.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
        with pytest.raises(UserError, match=r"without the collection 'perturbations'"):
            gradients(forward, trainer.init_state(), batch, ('layers/.*',))
