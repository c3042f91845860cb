# SPDX-License-Identifier: Apache-2.0
"""Device transforms with a random key: each step draws its own numbers, in every kind of run."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax import export as jax_export
from ml_collections import ConfigDict

from trainer import TaskOutput
from trainer.config import loading, overrides
from trainer.config.errors import UserError
from trainer.data.sources import ArraySource
from trainer.experiment import Experiment, build
from trainer.modes import export
from trainer.modes.features import precompute
from trainer.modules.rng import Keys
from trainer.tasks.runner import TaskRunner
from trainer.tasks.transformed import KeyedTransform
from trainer.trainer import Trainer

ROWS = 16


class Points(ArraySource):
    """Points with a text field, which stays on the host."""

    def __init__(self, examples: int = 64) -> None:
        x = np.random.default_rng(0).normal(size=(examples, 3)).astype(np.float32)
        name = np.array([f'point {i}' for i in range(examples)])
        super().__init__({'x': x, 'unused': x, 'name': name})


def draw(batch: Any, key: Any, training: bool) -> Any:
    """Adds the numbers that it draws, and whether it trains."""
    rows = batch['x'].shape[0]
    return {**batch, 'noise': jax.random.normal(key, (rows,)), 'on': jnp.full(rows, training)}


def also_drawn(batch: Any, *, key: Any = None) -> Any:
    return {**batch, 'other': jax.random.normal(key, (batch['x'].shape[0],))}


def rename(batch: Any, key: str = 'x') -> Any:
    return {**batch, 'x2': batch[key]}


class Fit:
    """The loss depends on the noise, so the parameters do, too."""

    def __call__(self, model: Any, batch: Any) -> Any:
        loss = (model(batch['x'])[:, 0] - batch['noise']) ** 2 + 0 * batch['other']
        return loss, {
            'noise': batch['noise'], 'other': batch['other'], 'on': batch['on'].astype(jnp.float32)
        }  # fmt: skip

    def predict(self, model: Any, batch: Any) -> dict[str, Any]:
        return {'noise': batch['noise'], 'on': batch['on'], 'y': model(batch['x'])[:, 0]}


class Weighted(Fit):
    def __call__(self, model: Any, batch: Any) -> Any:
        loss, metrics = super().__call__(model, batch)
        return TaskOutput(loss=loss, metrics=metrics, weights=(batch['x'][:, 0] > 0) * 1.0)


def make_experiment(**options: Any) -> Experiment:
    name = __name__
    transforms = tuple({'ref': f'{name}:{f}'} for f in ('draw', 'also_drawn', 'rename'))
    data = {'source': {'target': f'{name}:Points'}, 'device_transforms': transforms}
    config = ConfigDict({
        'seed': 0, 'train_for': '6 steps', 'model': {'target': f'{name}:Line'},
        'task': {'target': f'{name}:Fit'},
        'data': {**data, 'batch_size': ROWS, 'seed': 0},
        'optimizer': {'target': 'optax:sgd', 'learning_rate': 0.1},
        'evals': {'test': {'data': {**data, 'batch_size': 24}, 'every': 'never'}},
        'log': {'every': '1 steps'},
    })  # fmt: skip
    given = [(key.replace('__', '.'), value) for key, value in options.items()]
    overrides.apply(config, [(k, v if isinstance(v, str) else repr(v)) for k, v in given])
    return build(loading.LoadedConfig(config=config, name='keys', arg='', path=''))


class OnHost:
    """What Grain calls a `Map`."""

    def map(self, element: Any) -> Any:
        return element


class Line(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(x)


def normal(rows: int = ROWS, name: str = 'device_transforms[0]', **where: Any) -> np.ndarray:
    return np.asarray(jax.random.normal(Keys(**where).stream(name), (rows,)))


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_are_recognized_by_name() -> None:
    assert KeyedTransform.wrap(rename, 0) is rename
    assert KeyedTransform.wrap(np.negative, 0) is np.negative
    takes = [KeyedTransform.wrap(f, 0).takes for f in (draw, also_drawn)]
    assert takes == [{'key', 'training'}, {'key'}]
    assert KeyedTransform.wrap(functools.partial(also_drawn, key=None), 0).takes == {'key'}


def test_key_depends_on_seed_mode_step_index_and_position() -> None:
    runner = TaskRunner.from_task(
        lambda model, batch: batch['x'],
        [KeyedTransform.wrap(draw, 0), KeyedTransform.wrap(also_drawn, 1)],
    )
    seen = []
    for where in (
        {'seed': 0, 'mode': 'train'}, {'seed': 1, 'mode': 'train'}, {'seed': 0, 'mode': 'eval'},
        {'seed': 0, 'mode': 'train', 'step': 1}, {'seed': 0, 'mode': 'train', 'index': 1},
    ):  # fmt: skip
        batch = runner.prepare_batch({'x': jnp.zeros(3)}, Keys(**where))
        np.testing.assert_array_equal(batch['noise'], normal(3, **where))
        assert batch['on'].tolist() == [where['mode'] == 'train'] * 3
        seen += [*batch['noise'].tolist(), *batch['other'].tolist()]
    assert len(set(seen)) == len(seen)


def test_without_a_model_there_is_no_key() -> None:
    runner = TaskRunner.from_task(lambda model, batch: batch['x'], [KeyedTransform.wrap(draw, 0)])
    with pytest.raises(UserError, match=r'device transform <function draw.*keys of its step'):
        runner(None, {'x': jnp.zeros(3)})


def test_only_functions_of_a_batch_run_on_devices() -> None:
    with pytest.raises(UserError, match=r'device_transforms\[0\].*move it to config.data.transfo'):
        make_experiment(data__device_transforms=({'target': f'{__name__}:OnHost'},))


@pytest.mark.slow
def test_each_step_draws_its_own_numbers_and_a_resume_the_same(tmp_path: pathlib.Path) -> None:
    whole = Trainer(make_experiment(), str(tmp_path / 'whole')).fit()
    expected = [normal(seed=0, mode='train', step=step).mean() for step in range(6)]
    assert read_column(tmp_path / 'whole', 'train/noise') == pytest.approx(expected, abs=1e-6)
    other = normal(seed=0, mode='train', step=5, name='device_transforms[1]').mean()
    assert whole.metrics['train/other'] == pytest.approx(other, abs=1e-6)
    assert (whole.metrics['train/on'], whole.metrics['eval/test/on']) == (1, 0)
    # Three batches of 24 rows for 64 examples: the last one is padded, and weighted by its rows.
    batches = [normal(24, seed=0, mode='eval', step=6, index=i) for i in range(3)]
    assert whole.metrics['eval/test/noise'] == pytest.approx(
        np.concatenate(batches)[:64].mean(), abs=1e-6
    )
    first = str(tmp_path / 'parts')
    Trainer(make_experiment(), first).fit(max_steps=3)
    assert_same(Trainer(make_experiment(), first).fit().state.params, whole.state.params)
    fused = Trainer(make_experiment(steps_per_call=3, log__every='3 steps')).fit()
    assert_same(fused.state.params, whole.state.params)


@pytest.mark.slow
@pytest.mark.parametrize('task', ['Fit', 'Weighted'])
def test_micro_batches_draw_their_own_numbers(task: str) -> None:
    result = Trainer(make_experiment(accumulate=2, task__target=f'{__name__}:{task}')).fit(
        max_steps=1
    )
    mine = np.concatenate([
        normal(ROWS // 2, seed=0, mode='train', index=index) for index in range(2)
    ])  # fmt: skip
    if task == 'Fit':
        assert result.metrics['train/noise'] == pytest.approx(mine.mean(), abs=1e-6)
    assert np.isfinite(result.metrics['train/loss'])


@pytest.mark.slow
def test_a_member_draws_the_numbers_of_its_own_run() -> None:
    both = Trainer(make_experiment(ensemble={'size': 2})).fit()
    for member in range(2):
        alone = Trainer(make_experiment(seed=member)).fit()
        for name in ('train/noise', 'eval/test/noise'):
            own = name.replace('/noise', f'/member_{member}/noise')
            assert both.metrics[own] == pytest.approx(alone.metrics[name], abs=1e-6)
    assert both.metrics['train/member_0/noise'] != both.metrics['train/member_1/noise']


@pytest.mark.slow
def test_predictions_captures_features_and_exports(tmp_path: pathlib.Path) -> None:
    capture = {'all': {'match': 'Dense_0'}}
    trainer = Trainer(make_experiment(capture=capture), str(tmp_path / 'run'))
    result = trainer.fit()
    assert read_column(tmp_path / 'run', 'capture/all/Dense_0/mean')
    found = precompute(trainer, 'test', str(tmp_path / 'features.npz'), result.state)
    expected = np.concatenate([normal(24, seed=0, mode='eval', step=6, index=i) for i in range(3)])
    np.testing.assert_allclose(found['noise'], expected[:64], atol=1e-6)
    assert not found['on'].any()
    evaluator = trainer.set_up().evaluators['test']
    export.write(evaluator, result.state, epath.Path(tmp_path), platforms=('cpu',))
    function = jax_export.deserialize(bytearray((tmp_path / export.FUNCTION).read_bytes()))
    outputs = function.call({'x': np.ones((5, 3), np.float32)})
    assert outputs['noise'].shape == (5,) and not outputs['on'].any()


def read_column(workdir: pathlib.Path, name: str) -> list[float]:
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [row[name] for row in rows if name in row]
