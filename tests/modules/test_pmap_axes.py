# SPDX-License-Identifier: Apache-2.0
"""Models written for `jax.pmap`, with an axis name in normalization layers, train unmodified."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from flax.core import FrozenDict

from tests.marks import slow_after
from tests.modules.learning import trainer
from trainer import klinen as knn
from trainer.config.errors import UserError
from trainer.modes import dry_run, export
from trainer.modes.plan import plan
from trainer.modules.ensemble import EnsembleModel
from trainer.modules.ensemble_outputs import mean
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys

NOTICE = "names the jax.pmap axis 'batch'"
X = np.random.default_rng(0).normal(1.0, 2.0, (8, 6)).astype('f4')


class Normed(nn.Module):
    """A normalization layer of Linen after a dense layer."""

    norm: Callable[..., nn.Module]
    axis_name: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(axis_name=self.axis_name, name='norm')(nn.Dense(4)(x))


class NormedNNX(nnx.Module):
    """A normalization layer of NNX after a linear layer."""

    def __init__(self, norm: Any, rngs: nnx.Rngs, axis_name: Any = None):
        self.linear = nnx.Linear(6, 4, rngs=rngs)
        self.norm = norm(4, axis_name=axis_name, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.linear(x))


class Relu(nnx.BatchNorm):
    """A user's subclass of an NNX layer."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return nnx.relu(super().__call__(*args, **kwargs))


class ReluLinen(nn.BatchNorm):
    """The same for Linen."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return nn.relu(super().__call__(*args, **kwargs))


def branches() -> nn.Module:
    """Creates two layers that share statistics over a bound axis."""
    lifted = nn.vmap(
        nn.BatchNorm, in_axes=-1, out_axes=-1, axis_name='branch',
        variable_axes={'params': None, 'batch_stats': None}, split_rngs={'params': False},
    )  # fmt: skip
    return lifted(axis_name='branch', **TRAINING)


def output(model: Any, mode: str = 'train') -> tuple[Any, Any]:
    """Returns the output of a call of a model, and the collections after it."""
    wrapped = as_functional(model)
    variables = wrapped.init(lambda m, b: m(b), X, Keys(seed=0, mode='init'))
    bound = wrapped.bind(variables, Keys(seed=0, mode=mode))
    return bound(X), bound.collections


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if NOTICE in record.getMessage()]


def check(make: Callable[[Any], Any], where: str, caplog: pytest.LogCaptureFixture) -> None:
    """Checks that a model with a `pmap` axis equals one without, and warns once."""
    caplog.clear()
    jax.tree.map(np.testing.assert_array_equal, output(make('batch')), output(make(None)))
    (notice,) = notices(caplog)
    assert notice.startswith(f'config.model: {where}'), notice


TRAINING = {'use_running_average': False}
LAYERS = ['BatchNorm', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm']


@pytest.mark.parametrize('name', LAYERS)
def test_every_layer_of_linen(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {'GroupNorm': {'num_groups': 2}, 'BatchNorm': TRAINING}.get(name, {})
    norm = functools.partial(getattr(nn, name), **kwargs)
    check(lambda axis: Normed(norm, axis), f'norm ({name})', caplog)


@pytest.mark.parametrize('name', LAYERS)
def test_every_layer_of_nnx(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {'num_groups': 2} if name == 'GroupNorm' else {}
    norm = functools.partial(getattr(nnx, name), **kwargs)
    make = functools.partial(NormedNNX, norm)
    check(lambda axis: functools.partial(make, axis_name=axis), f'norm ({name})', caplog)


class Bridged(nnx.Module):
    """A Linen layer in an NNX module."""

    def __init__(self, rngs: nnx.Rngs, axis_name: Any = None):
        norm = Normed(functools.partial(nn.BatchNorm, **TRAINING), axis_name)
        self.linen = nnx.bridge.ToNNX(norm, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linen(x)


class ToLinen(nn.Module):
    """An NNX layer in a Linen module."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        arguments = {'norm': nnx.BatchNorm, 'axis_name': self.axis_name}
        return nnx.bridge.ToLinen(NormedNNX, kwargs=FrozenDict(arguments))(x)


class Remat(nn.Module):
    """A layer with rematerialization."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(nn.BatchNorm)(use_running_average=False, axis_name=self.axis_name)(x)


FORMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    'a Linen layer in NNX': (lambda axis: functools.partial(Bridged, axis_name=axis), 'norm'),
    'an NNX layer in Linen': (ToLinen, 'norm'),
    'nn.remat': (Remat, 'CheckpointBatchNorm_0'),
    'an own NNX layer': (
        lambda axis: functools.partial(NormedNNX, Relu, axis_name=axis), 'norm (Relu)',
    ),
    'an own Linen layer': (
        lambda axis: Normed(functools.partial(ReluLinen, **TRAINING), axis), 'norm (ReluLinen)',
    ),
    'a Klinen layer': (lambda axis: Normed(knn.BatchNorm, axis), 'norm (BatchNorm)'),
    'the whole model': (
        lambda axis: nn.LayerNorm(axis_name=axis), 'the model (LayerNorm)',
    ),
    'several axes': (
        lambda axis: nn.LayerNorm(axis_name=axis and (axis,)), 'the model (LayerNorm)',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', slow_after(2, FORMS))
def test_layers_in_every_place(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check(*FORMS[name], caplog)


class Branches(nn.Module):
    """Two layers that are mapped over the last dimension."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return branches()(jnp.stack([x, x + 5], -1))


def test_bound_axes_of_linen_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """An axis that the model binds with `vmap` is averaged over, also in a lifted layer."""
    found, _ = output(Branches())
    np.testing.assert_allclose(found.mean(), 0, atol=1e-5)
    assert np.abs(found.mean((0, 1))).min() > 0.5, 'normalised by the statistics of both'
    assert not notices(caplog)


def test_bound_axes_of_nnx_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    def call(module: Any, x: jax.Array) -> jax.Array:
        return module(x)

    class Mapped(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(6, axis_name='batch', rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(call, in_axes=(None, 0), axis_name='batch')(self.norm, x)

    found, _ = output(Mapped)
    np.testing.assert_allclose(found.mean(), 0, atol=1e-5)
    assert np.abs(found.mean(-1)).max() > 0.05
    assert not notices(caplog)


def test_groups_of_devices_are_refused() -> None:
    groups = [[0, 1], [2, 3]]
    linen = functools.partial(nn.LayerNorm, axis_index_groups=groups)
    with pytest.raises(UserError, match=r'norm \(LayerNorm\) normalizes over groups.*GroupedBatch'):
        output(Normed(linen, 'batch'))
    of_nnx = functools.partial(nnx.BatchNorm, axis_index_groups=groups)
    with pytest.raises(UserError, match=r'norm \(BatchNorm\) normalizes over groups.*GroupedBatch'):
        output(functools.partial(NormedNNX, of_nnx, axis_name='batch'))


class Net(nn.Module):
    """Names the axis in layers that normalize over the batch and over single examples."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, axis_name='batch')(nn.Dense(8)(x))
        return nn.Dense(4)(nn.LayerNorm(axis_name='batch')(x))


class NetNNX(nnx.Module):
    """The same for NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.Sequential(
            nnx.Linear(8, 8, rngs=rngs),
            nnx.BatchNorm(8, axis_name='batch', rngs=rngs),
            nnx.LayerNorm(8, axis_name='batch', rngs=rngs),
            nnx.Linear(8, 4, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.parametrize('model', [Net, NetNNX])
def test_every_mode_of_a_run(
    model: type, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training, evaluation, predictions, export, dry run and plan, with one warning."""
    run = trainer({'target': f'{__name__}:{model.__name__}'}, steps=4)
    dry_run.rehearse(run.experiment, str(tmp_path / 'run'))
    setup, batch_size = run.set_up(), run.experiment.clock.batch_size
    assert plan.make(setup.programs, setup.mesh, batch_size).flops > 0
    result = run.fit()
    assert np.isfinite(result.metrics['eval/test/loss'])
    assert next(iter(run.predict('test', result.state)))
    evaluator, axes = run.set_up().evaluators['test'], tuple(run.set_up().mesh.shape)
    written = export.write(
        evaluator, result.state, epath.Path(tmp_path), axes=axes, platforms=['cpu']
    )
    assert written['outputs']
    assert len(notices(caplog)) == 1
    again = run.model(result.state)
    x = np.random.default_rng(1).normal(size=(3, 8)).astype('f4')
    assert np.isfinite(again(x, train=False) if model is Net else again(x)).all()


class Averaging(nn.Module):
    """Averages over an axis with a collective of its own."""

    axis_name: str = 'batch'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmean(nn.Dense(4)(x), self.axis_name)


class AveragingNNX(nnx.Module):
    """The same for NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmean(self.linear(x), 'batch')


@pytest.mark.parametrize('name', slow_after(1, ['Averaging', 'AveragingNNX']))
def test_other_collectives_are_an_error(name: str) -> None:
    run = trainer({'target': f'{__name__}:{name}'}, steps=4)
    with pytest.raises(UserError, match=r"'batch' of jax.pmap \(.*test_pmap_axes.py, line \d+\)"):
        run.fit()


def test_mesh_axes_are_kept() -> None:
    run = trainer({'target': f'{__name__}:Averaging', 'axis_name': 'data'}, steps=4)
    with pytest.raises(UserError, match=r"'data' of the mesh, which only jax.shard_map binds"):
        run.fit()


@pytest.mark.slow
def test_members_of_an_ensemble() -> None:
    """Their evaluation omits the name, too."""
    model, named = as_functional(Normed(nn.LayerNorm)), as_functional(Normed(nn.LayerNorm, 'batch'))
    keys = Keys(seed=0, mode='eval')
    one = model.init(lambda bound, batch: bound(batch['x']), {'x': X}, keys)
    both = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), one)
    expected, got = (
        EnsembleModel(each, both, keys, jnp.arange(2), combine=mean)(X) for each in (model, named)
    )
    np.testing.assert_array_equal(got, expected)
