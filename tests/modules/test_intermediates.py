# SPDX-License-Identifier: Apache-2.0
"""A task reads sown values of Linen modules; a task that does not pays nothing."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.command import ROOT
from tests.inspect.program import computation
from tests.marks import slow_after
from tests.modules.examples import X, bind, init, same
from trainer.experiment import load_and_build
from trainer.klinen.notebook import bind_for_notebook
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer


class Sowing(nn.Module):
    """Sows twice, and accumulates under another name."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Dense(4)(x)
        self.sow('intermediates', 'h', h)
        for value in (x, 2 * x):
            self.sow('intermediates', 'sum', value, init_fn=lambda: 0, reduce_fn=lambda a, b: a + b)
        return nn.relu(h)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        part = Sowing(name='part')
        return part(x) + part(x)


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_task_reads_sown_values(mode: str) -> None:
    """A tuple with one value per `sow`; a custom reduction; nothing in the state."""
    model = bind(Twice(), mode)
    assert model.intermediates == {}
    output = model(X)
    sown = model.intermediates['part']
    assert len(sown['h']) == 2
    assert same(output, 2 * nn.relu(sown['h'][0]))
    one = bind(Sowing(), mode)
    one(X)
    assert same(one.intermediates['sum'], 3 * X)
    one(2 * X)
    assert same(one.intermediates['sum'], 6 * X)  # Of the last call: nothing piles up.
    assert set(init(Twice())) == {'params'}
    assert set(model.variables) == {'params'}


def test_views_share_the_intermediates() -> None:
    model = bind(Sowing())
    model.stop_gradient('.*')(2 * X)
    assert same(model.intermediates['sum'], 6 * X)


class Layer(nn.Module):
    sows: bool = True

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        x = nn.relu(nn.Dense(4)(x))
        if self.sows:
            self.sow('intermediates', 'h', x * 2)
        return x, None


class Stack(nn.Module):
    kind: str = 'plain'
    sows: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer: Any = nn.remat(Layer) if 'remat' in self.kind else Layer
        if 'scan' in self.kind:
            axes = {'params': 0, **({'intermediates': 0} if 'open' in self.kind else {})}
            lifted = nn.scan(layer, variable_axes=axes, split_rngs={'params': True}, length=3)
            x, _ = lifted(self.sows, name='layers')(x, None)
        else:
            for _ in range(3):
                x, _ = layer(self.sows)(x, None)
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    'kind', slow_after(2, ['plain', 'remat open scan', 'remat', 'scan', 'open scan'])
)
def test_unread_values_cost_nothing(kind: str) -> None:
    """The compiled gradient of a model that sows is that of one that does not."""
    texts = []
    for sows in (False, True):
        model = as_functional(Stack(kind, sows))
        keys = Keys(seed=0, mode='train')
        variables = model.init(lambda model, batch: model(X), {}, Keys(seed=0, mode='init'))

        def loss(params: Any, model: Any = model, keys: Keys = keys) -> Any:
            return (model.bind({'params': params}, keys)(X) ** 2).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(variables['params']).compile()
        texts.append(computation(compiled))
    assert texts[0] == texts[1]


def test_scans_pass_on_listed_collections() -> None:
    model = bind(Stack('open scan'))
    model(X)
    assert model.intermediates['layers']['h'][0].shape == (3, 3, 4)
    closed = bind(Stack('scan'))
    closed(X)
    assert closed.intermediates == {}


class Branching(nn.Module):
    """Sows in one branch only, which Flax allows if the collection is immutable."""

    sows: bool = True

    def setup(self) -> None:
        self.one, self.two, self.last = nn.Dense(4), nn.Dense(4), nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        if self.is_initializing():
            self.one(x), self.two(x)

        def first(module: Branching, x: Any) -> Any:
            if self.sows:
                module.sow('intermediates', 'h', x)
            return module.one(x)

        x = nn.cond(x.sum() > 0, first, lambda module, x: module.two(x), self, x)
        return self.last(x)


def test_branches_may_sow_differently() -> None:
    """A model whose branches sow different values can be called; nothing is captured."""
    model = bind(Branching())
    expected = Branching().apply(model.variables, X)
    assert same(model(X), expected)
    assert model.intermediates == {}


class VAE(nn.Module):
    """A variational autoencoder of binary images, which sows its KL loss."""

    latent: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        mean, log_std = nn.Dense(self.latent)(hidden), nn.Dense(self.latent)(hidden)
        kl = 0.5 * (mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1).sum(-1)
        self.sow('intermediates', 'kl', kl)
        noise = jax.random.normal(self.make_rng('noise'), mean.shape)
        return nn.Dense(784)(nn.relu(nn.Dense(64)(mean + jnp.exp(log_std) * noise)))


def reconstruction(model: Any, batch: Any) -> TaskOutput:
    pixels = (batch['image'] > 0.5).astype(jnp.float32).reshape(len(batch['image']), -1)
    loss = optax.sigmoid_binary_cross_entropy(model(batch['image']), pixels).sum(-1)
    (kl,) = model.intermediates['kl']
    return TaskOutput(loss=loss, metrics={'kl': kl}, penalties={'weighted_kl': 0.1 * kl.mean()})


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sown_loss_is_a_penalty(accumulate: int, tmp_path: pathlib.Path) -> None:
    """The KL loss of a VAE, sown by its module, is trained on."""
    made = load_and_build(
        str(ROOT / 'configs' / 'mnist_mlp.py'), train_for='60 steps', log__every='20 steps',
        evals={}, checkpoint__every='never', data__source__limit=960, accumulate=accumulate,
        model={'target': f'{__name__}:VAE'}, task={'ref': f'{__name__}:reconstruction'},
        optimizer={'target': 'optax:adam', 'learning_rate': 3e-3},
    )  # fmt: skip
    trainer = Trainer(made, str(tmp_path))
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['train/loss'] < 0.6 * rows[0]['train/loss']
    for row in rows:
        assert row['train/weighted_kl'] == pytest.approx(0.1 * row['train/kl'], rel=1e-4)
    assert trainer.init_state().collections == {}


class Refactored(nn.Module):
    """A network of two submodules that can be called separately."""

    def setup(self) -> None:
        self.features = Features()
        self.classifier = nn.Dense(10)

    def __call__(self, x: Any) -> Any:
        return self.classifier(self.features(x))


class Features(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.relu(nn.Dense(8)(x))


def test_features_of_a_submodule() -> None:
    """`model.features(x)` is what `apply(method=...)` gives."""
    model = bind(Refactored())
    expected = Refactored().apply(model.variables, X, method=lambda m, x: m.features(x))
    assert same(model.features(X), expected)
    assert same(model.classifier(model.features(X)), model(X))


def test_features_of_a_sequential() -> None:
    """A slice of a Sequential uses the parameters of the whole."""
    layers = (nn.Dense(8), nn.relu, nn.Dense(6), nn.relu, nn.Dense(2), nn.log_softmax)
    whole = nn.Sequential(layers)
    variables = init(whole)
    model = as_functional(nn.Sequential(layers[:3])).bind(variables, Keys(seed=0, mode='eval'))
    first, second = (variables['params'][f'layers_{i}'] for i in (0, 2))
    hidden = jax.nn.relu(X @ first['kernel'] + first['bias'])
    np.testing.assert_allclose(model(X), hidden @ second['kernel'] + second['bias'], rtol=1e-5)
    # A layer with a name needs no slice.
    assert same(bind(whole).layers[0](X), X @ first['kernel'] + first['bias'])


class AutoEncoder(nn.Module):
    def setup(self) -> None:
        self.encoder = nn.Dense(3)
        self.decoder = nn.Dense(4)

    def __call__(self, x: Any) -> Any:
        return self.decoder(self.encoder(x))


def test_a_bound_model_in_a_notebook() -> None:
    """Bind, call submodules, unbind; also with the model of Trainer.model()."""
    variables = init(AutoEncoder())
    bound = AutoEncoder().bind(variables)
    again = bind_for_notebook(as_functional(AutoEncoder()), variables)
    assert same(bound.decoder(bound.encoder(X)), bound(X))
    assert same(again.decoder(again.encoder(X)), bound(X))
    encoder, encoded = bound.encoder.unbind()
    assert same(encoder.apply(encoded, X), bound.encoder(X))
    assert same(encoded['params']['kernel'], variables['params']['encoder']['kernel'])
