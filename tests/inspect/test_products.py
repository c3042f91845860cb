# SPDX-License-Identifier: Apache-2.0
"""A run warns if the model does not compute in the requested half precision."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import command
from tests.command import ROOT
from tests.inspect.models import build
from tests.marks import slow_except
from tests.pages import TEXTS
from tests.test_configs import SHORT
from trainer.experiment import Experiment, load_and_build
from trainer.inspect import products
from trainer.models.transformer import Attention
from trainer.observe import flops
from trainer.step.custom_step import CustomStepContext
from trainer.trainer import Trainer

HALF: dict[str, Any] = {'compute': 'bfloat16'}
ONES = np.ones(16, np.float32)


class Promoting(nn.Module):
    """Adds a float32 array after a layer, and counts its calls."""

    layers: int = 3
    promotes: bool = True
    scans: bool = False
    head: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        CALLS.append(1)
        x = nn.Dense(16, name='first')(x.reshape(len(x), -1))
        x = x + ONES if self.promotes else x
        if self.scans:
            axes = {'params': 0, 'intermediates': 0}
            scan = nn.scan(
                nn.remat(Pair), variable_axes=axes, split_rngs={'params': True}, length=self.layers
            )
            x, _ = scan(name='pairs')(x, None)
        for index in range(0 if self.scans else self.layers):
            x, _ = Pair(name=f'pair_{index}')(x, None)
        return nn.Dense(10, dtype=self.head, name='last')(x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> Any:
        y = nn.Dense(256, name='wide')(x)
        return nn.Dense(16, name='narrow')(nn.relu(y)).astype(x.dtype), None


class NNXPromoting(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(784, 16, rngs=rngs)
        self.layers = nnx.List(nnx.Linear(16, 16, rngs=rngs) for _ in range(24))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x.reshape(len(x), -1)) + ONES
        for layer in self.layers:
            x = layer(x)
        return x


class Backwards(nn.Module):
    """The forward products are in half precision; only the backward ones are not."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Precise(name='head')(nn.Dense(512, name='first')(x.reshape(len(x), -1)))


class Precise(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (512, 512))
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


CALLS: list[int] = []


def linen(**arguments: Any) -> dict[str, Any]:
    return {'target': f'{__name__}:Promoting', **arguments}


def experiment(model: Any = None, **options: Any) -> Experiment:
    return build(model or linen(), **{'precision': HALF, **options})


def warnings(made: Experiment, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'trainer'):
        products.warn_of_other_dtypes(Trainer(made).set_up().programs, made.model)
    return [record.getMessage() for record in caplog.records]


def test_the_text_of_the_warning(caplog: pytest.LogCaptureFixture) -> None:
    [text] = warnings(experiment(), caplog)
    # Of each row, forward and twice backward, but not into the image.
    first, rest = 2 * 784 * 16, 3 * (3 * 2 * 16 * 256 + 16 * 10)
    share = round(100 * rest / (first + rest))
    assert share == 75
    assert text == (
        "config.precision.compute=bfloat16, but 75 % of the model's operations (matrix products "
        'and convolutions) are float32, first in pair_0/wide. A float32 array or module there or '
        'earlier promotes everything after it to float32; cast its result back, as in '
        'y.astype(x.dtype)'
    )


class Uncast(Attention):
    """The attention of a transformer whose softmax promotes what follows to float32."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        shape = (*x.shape[:2], self.heads, -1)
        names = ('query', 'key', 'value')
        each = (nn.Dense(x.shape[-1], name=name)(x).reshape(shape) for name in names)
        y = nn.dot_product_attention(*each, mask=mask, force_fp32_for_softmax=True)
        return nn.Dense(x.shape[-1], name='out')(y.reshape(x.shape))


@pytest.mark.slow
def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('trainer.models.transformer.Attention', Uncast)
    made = load_and_build(str(ROOT / 'configs' / 'lm.py:bytes'), precision=HALF)
    programs = Trainer(made).set_up().programs
    text = products.describe(programs, made.model, programs.jaxpr(made.model))
    [shown] = [text for text in TEXTS if text.startswith('config.precision.compute')]
    assert text == ' '.join(shown.split())


def own_step(state: Any, batch: Any, ctx: CustomStepContext) -> Any:
    """A custom step that differentiates the model, with matrix products of its own in float32."""

    def loss(params: Any) -> Any:
        model = ctx.bind(params)
        output = ctx.task(model, batch)
        return ctx.loss(output), model.collections

    (value, collections), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    large = jnp.ones((512, 512))
    state, metrics = ctx.update(state, grads, collections)
    return state, {'loss': value, 'trace': (large @ large).sum(), **metrics}


HOWEVER: list[dict[str, Any]] = [
    {'accumulate': 2},
    {'steps_per_call': 4},
    {'ensemble': {'size': 2}},
    {'precision': {'compute': 'float16'}},
    {'step': {'ref': f'{__name__}:own_step'}},
    {'ema': {'decay': 0.9}, 'mesh': {'data': 2, 'fsdp': 4}, 'sharding': 'fsdp'},
    {'guard': {'non_finite': 'stop'}},
]


@pytest.mark.parametrize(
    'options', slow_except([{'steps_per_call': 4}], HOWEVER), ids=lambda options: '-'.join(options)
)
def test_warns_for_every_kind_of_run(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    [text] = warnings(experiment(**options), caplog)
    assert '75 % of' in text and 'float32, first in pair_0/wide.' in text
    assert warnings(experiment(linen(promotes=False), **options), caplog) == []


@pytest.mark.parametrize(
    'options', slow_except([{}], [{}, *HOWEVER[:3:2]]), ids=lambda options: '-'.join(options)
)
def test_scanned_layers(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    [text] = warnings(experiment(linen(scans=True, layers=1), **options), caplog)
    assert 'float32, first in pairs/wide.' in text


@pytest.mark.slow
def test_nnx(caplog: pytest.LogCaptureFixture) -> None:
    made = experiment({'target': f'{__name__}:NNXPromoting'})
    [text] = warnings(made, caplog)
    assert '% of' in text and 'first in layers/0.' in text


def test_warns_of_the_backward_pass_alone(caplog: pytest.LogCaptureFixture) -> None:
    [text] = warnings(experiment({'target': f'{__name__}:Backwards'}), caplog)
    assert 'first in head.' in text


@pytest.mark.slow
def test_all_products_of_the_step_are_counted() -> None:
    """It counts all operations of the gradient, with and without micro-batches."""
    for options in ({}, {'accumulate': 2}, {'ensemble': {'size': 2}}):
        made = experiment(linen(scans=True), **options)
        programs = Trainer(made).set_up().programs
        found = sum(products.model_operations(programs.jaxpr(made.model)).values())
        plain = experiment(linen(scans=True), precision=None, **options)
        whole = flops.count(Trainer(plain).set_up().programs.jaxpr(plain.model))
        # The rest are three norms of all parameters, and a look at them and at their momentum.
        size = sum(x.size for x in jax.tree.leaves(programs.abstract.params))
        looks = 2 if 'ensemble' in options else 0
        assert whole - found == (3 + looks) * 2 * size


QUIET: dict[str, dict[str, Any]] = {
    'as asked': {'model': linen(promotes=False)},
    'a small head': {'model': linen(promotes=False, head='float32')},
    'none asked for': {'precision': None},
    'other parameters': {'precision': {'params': 'bfloat16'}},
    'asked for': {'precision': {'compute': 'float32'}},
    # Matrix products in the optimizer, and in the task.
    'muon': {'model': linen(promotes=False),
             'optimizer': {'target': 'optax.contrib:muon', 'learning_rate': 0.1},
             'data__batch_size': 8},
    'task': {'model': linen(promotes=False), 'task': {'ref': f'{__name__}:with_products'}},
}  # fmt: skip


def with_products(model: Any, batch: Any) -> Any:
    logits = model(batch['image'])
    large = jnp.tile(logits, (1, 100))
    return optax.squared_error(large @ large.T).sum(-1)


@pytest.mark.parametrize('name', QUIET)
def test_no_false_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(experiment(**QUIET[name]), caplog) == []


@pytest.mark.slow
def test_products_of_optimizer_and_task_exist_in_the_step() -> None:
    """Otherwise excluding them would be untested."""
    for name in ('muon', 'task'):
        made = experiment(**QUIET[name])
        jaxpr = Trainer(made).set_up().programs.jaxpr(made.model)
        assert flops.count(jaxpr) > 1.2 * sum(products.model_operations(jaxpr).values())


@pytest.mark.slow
def test_the_step_is_traced_again_only_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Once, to name the module."""
    for promotes, more in ((False, 0), (True, 1)):
        made = experiment(linen(promotes=promotes))
        programs = Trainer(made).set_up().programs
        programs.step.start()
        before = len(CALLS)
        products.warn_of_other_dtypes(programs, made.model)
        assert len(CALLS) - before == more


@pytest.mark.slow
def test_a_run_warns_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(experiment(train_for='2 steps'), tmp_path)
    with caplog.at_level(logging.WARNING, 'trainer'):
        result = trainer.fit()
        trainer.compile()
    assert result.step == 2 and np.isfinite(result.metrics['train/loss'])
    assert [r.getMessage() for r in caplog.records if 'precision' in r.getMessage()] == [
        r.getMessage() for r in caplog.records
    ]
    assert len(caplog.records) == 1


@pytest.mark.parametrize('half', slow_except(['bfloat16'], ['bfloat16', 'float16']))
@pytest.mark.parametrize('name', slow_except(['mnist_nnx'], SHORT))
def test_configs(name: str, half: str) -> None:
    """Every product of the shipped models is in half precision."""
    path = str(ROOT / 'configs' / f'{name}.py')
    made = load_and_build(path, precision={'compute': half}, **SHORT[name])
    found = products.model_operations(Trainer(made).set_up().programs.jaxpr(made.model))
    assert {place.dtype for place in found} == {half}


@pytest.mark.slow
@pytest.mark.parametrize('half', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['lm.py:bytes', 'lm_packed.py', 'addition.py'])
def test_the_command_does_not_warn(name: str, half: str, tmp_path: pathlib.Path) -> None:
    scans = [] if name == 'addition.py' else ['--config.model.scan_layers=True']
    small = ['--config.train_for=3 steps', '--config.evals={}', '--config.data.batch_size=2']
    finished = command.run(
        f'--config=configs/{name}', f'--config.precision.compute={half}', *scans, *small,
        f'--workdir={tmp_path}',
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert 'warning' not in (finished.err + finished.out).lower()
    assert np.isfinite(command.result(tmp_path)['metrics']['train/loss'])
