# SPDX-License-Identifier: Apache-2.0
"""Custom steps (`config.step`)."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import CLOCK, ROOT
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.parallel.mesh import batch_sharding
from trainer.run.failure import NonFiniteError
from trainer.step.custom_step import CustomStepContext
from trainer.tasks import TaskOutput
from trainer.trainer import Trainer

MNIST = str(ROOT / 'configs' / 'mnist_mlp.py')


def trainer(workdir: pathlib.Path | None = None, **overrides: Any) -> Trainer:
    options: dict[str, Any] = {
        'train_for': '30 steps',
        'data__source__limit': 640,
        'evals__test__data__source__limit': 64,
        'model__features': (8, 10),
        'model__dropout_rate': 0.3,
        'model__batch_norm': True,
        'checkpoint__every': '10 steps',
        'log__every': '5 steps',
        # Steps that can stop are fused differently by XLA: the last bits would differ.
        'guard': {'non_finite': 'warn'},
    }
    experiment = load_and_build(MNIST, **{**options, **overrides})
    return Trainer(experiment, None if workdir is None else str(workdir))


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in lines]


def train_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [row for row in rows(workdir) if any(name.startswith('train/') for name in row)]


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    'options', [{}, pytest.param({'accumulate': 2, 'ema__decay': 0.9}, marks=pytest.mark.slow)]
)
def test_default_step_as_custom_step_is_bit_equal(tmp_path: pathlib.Path, options: Any) -> None:
    """State and rows are bit-equal."""
    ours = trainer(tmp_path / 'ours', **options).fit()
    step = {'ref': 'tests.step.steps:same'}
    theirs = trainer(tmp_path / 'theirs', step=step, **options).fit()
    assert_same(ours.state, theirs.state)
    assert rows(tmp_path / 'ours') == rows(tmp_path / 'theirs')


@pytest.mark.slow
@pytest.mark.parametrize(
    'step',
    [
        {'ref': 'tests.step.steps:step_by_hand'},
        {'target': 'tests.step.steps:make_by_hand'},
        {'ref': 'tests.step.steps:own_gradients'},
    ],
)
def test_handwritten_step_gives_the_same_parameters(
    tmp_path: pathlib.Path, step: dict[str, str]
) -> None:
    """Dropout, batch statistics, optimizer state and rows, too."""
    ours = trainer(tmp_path / 'ours').fit().state
    theirs = trainer(tmp_path / 'theirs', step=step).fit().state
    for name in ('step', 'params', 'opt_state', 'collections'):
        assert_same(getattr(ours, name), getattr(theirs, name))
    # The norm of the update is that of a difference of parameters, with its rounding.
    default, custom = train_rows(tmp_path / 'ours')[-1], train_rows(tmp_path / 'theirs')[-1]
    assert custom == pytest.approx(default, rel=1e-4)
    assert {'train/loss', 'train/grad_norm', 'train/learning_rate'} <= custom.keys()


@pytest.mark.slow
def test_the_metrics_of_a_step_stop_a_run_that_diverges() -> None:
    options = {'guard': {'non_finite': 'stop'}, 'optimizer__learning_rate': 1e30}
    with pytest.raises(NonFiniteError, match='First non-finite step: 2'):
        trainer(step={'ref': 'tests.step.steps:own_gradients'}, evals={}, **options).fit()


def test_norms_need_gradients() -> None:
    with pytest.raises(UserError, match=r'call ctx\.metrics\(output\)'):
        trainer(step={'ref': 'tests.step.steps:forgets_gradients'}).set_up()


SAM = {'target': 'tests.step.steps:sam', 'rho': 0.05}


@pytest.mark.slow
def test_arguments_metrics_fused_steps_and_resume(tmp_path: pathlib.Path) -> None:
    """A target that is the step itself gets its other arguments from the config."""
    whole = trainer(tmp_path / 'whole', step=SAM).fit()
    trainer(tmp_path / 'cut', step=SAM).fit(max_steps=17)
    cut = trainer(tmp_path / 'cut', step=SAM).fit()
    assert_same(whole.state, cut.state)
    assert rows(tmp_path / 'whole') == rows(tmp_path / 'cut')
    fused = trainer(tmp_path / 'fused', step=SAM, steps_per_call=5).fit()
    assert_same(whole.state, fused.state)
    last = train_rows(tmp_path / 'cut')[-1]
    assert last['train/inner/two'] == 2.0
    assert last['train/mean'] == 1.0
    assert 0.0 < last['train/inner/noise'] < 1.0
    assert last['train/ascent/norm'] > 0.0
    other = trainer(step={**SAM, 'rho': 0.5}).fit()
    assert not np.array_equal(
        other.state.params['Dense_0']['kernel'], whole.state.params['Dense_0']['kernel']
    )


@pytest.mark.slow
def test_scalar_metrics_are_averaged_between_rows(tmp_path: pathlib.Path) -> None:
    each = trainer(tmp_path / 'each', step=SAM, log__every='1 step', train_for='10 steps')
    each.fit()
    norms = [row['train/ascent/norm'] for row in train_rows(tmp_path / 'each')]
    trainer(tmp_path / 'five', step=SAM, train_for='10 steps').fit()
    means = [row['train/ascent/norm'] for row in train_rows(tmp_path / 'five')]
    np.testing.assert_allclose(means, np.reshape(norms, (2, 5)).mean(1), rtol=1e-5)


@pytest.mark.slow
def test_several_updates_count_as_one_step() -> None:
    state = trainer(step={'ref': 'tests.step.steps:twice'}, optimizer__target='optax:adam').fit()
    assert int(state.state.step) == 30
    assert int(state.state.opt_state[0].count) == 60


@pytest.mark.slow
def test_custom_step_is_sharded_and_donates_its_state() -> None:
    """On eight devices, over which the batch is sharded."""
    run = trainer(step=SAM)
    state = run.init_state()
    batch = {name: x[0] for name, x in run.experiment.data.block(0, 1).arrays.items()}
    new = run.set_up().programs.step(
        state, jax.device_put(batch, batch_sharding(run.set_up().mesh))
    )
    assert state.params['Dense_0']['kernel'].is_deleted()
    assert len(new.params['Dense_0']['kernel'].sharding.device_set) == 8


@pytest.mark.parametrize(
    ('step', 'message'),
    [
        (
            {'ref': 'tests.step.steps:changes_dtype'},
            r'shapes of the state: params/\S+: float32',
        ),
        ({'ref': 'tests.step.steps:drops_state'}, r'must return \(state, metrics\), with a state'),
        ({'ref': 'tests.step.steps:metric_is_vector'}, r"metric 'a/b' must be a .*float32\[3\]"),
        ({'ref': 'tests.step.steps:metrics_is_scalar'}, r'in a dict by name; got float32\[\]'),
        (
            {'ref': 'tests.step.steps:names_norms'},
            "names a metric 'norms', but this name is reserved",
        ),
        (
            {'ref': 'tests.step.steps:names_speed'},
            "names a metric 'steps_per_sec', but this name is reserved",
        ),
        ({'ref': 'tests.step.steps:takes_two'}, r'expected a function \(state, batch, ctx\)'),
        ({'target': 'tests.step.steps:takes_two'}, 'config.step.state is missing'),
        ({'target': 'tests.step.steps:sam'}, 'config.step.rho is missing'),
        ({**SAM, 'rhoo': 1.0}, 'Did you mean config.step.rho?'),
        ({'ref': 'tests.step.steps:sma'}, 'Did you mean tests.step.steps:sam?'),
    ],
)
def test_invalid_steps_are_rejected(step: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(step=step).init_state()


def test_accumulate_requires_ctx_gradients() -> None:
    with pytest.raises(UserError, match=r'only ctx\.gradients splits a batch'):
        trainer(step={'ref': 'tests.step.steps:step_by_hand'}, accumulate=2).init_state()
    trainer(step={'ref': 'tests.step.steps:same'}, accumulate=2).init_state()


def test_ctx_loss_equals_the_loss_of_the_default_step() -> None:
    """A batch of padding alone gives 0, not NaN; penalties are added."""
    # `loss` uses no part of the context.
    nothing: Any = None
    ctx = CustomStepContext(nothing, nothing)
    loss, weights = jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0])
    output = TaskOutput(loss=loss, weights=weights, penalties={'l2': jnp.float32(0.5)})
    assert ctx.loss(output) == 2.0
    assert ctx.loss(output.replace(weights=jnp.zeros(2), penalties={})) == 0.0
    two = output.replace(loss={'a': loss, 'b': 2 * loss}, weights={'a': weights, 'b': weights})
    assert ctx.loss(two) == {'a': 2.0, 'b': 3.5}
