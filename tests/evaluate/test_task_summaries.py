# SPDX-License-Identifier: Apache-2.0
"""An evaluation writes the summaries of its task for its first batch."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests.evaluate import scored
from tests.evaluate.test_host_scores import CONFIG, trainer
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.summaries import Arrays, Histogram, Images
from trainer.tasks.task import TaskOutput

HERE = __name__


def showing(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    """Shows the inputs of the first 16 examples as images, and values of all."""
    loss = (model(batch['x'])[:, 0] - batch['label']) ** 2
    return TaskOutput(
        loss=loss,
        # Of weight 0, which must not keep an example from being shown.
        weights=batch['label'].astype(jnp.float32),
        summaries={
            'inputs': Images(jax.nn.sigmoid(batch['x'][:16]).reshape(-1, 2, 2), columns=4),
            'nested/loss': Histogram(loss, bins=5),
            'all': Arrays({'x': batch['x'], 'loss': loss}),
        },
    )


def bare(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    return TaskOutput(loss=model(batch['x'])[:, 0], summaries={'x': batch['x']})


def constant(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    return TaskOutput(loss=model(batch['x'])[:, 0], summaries={'x': Histogram(np.ones(3))})


def no_rows(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    return TaskOutput(loss=model(batch['x'])[:, 0], summaries={'x': Histogram(batch['x'].mean())})


def no_images(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    rows = batch['label'][:, None, None]
    return TaskOutput(loss=model(batch['x'])[:, 0], summaries={'x': Images(rows)})


def config(task: str, **changes: Any) -> ml_collections.ConfigDict:
    made = scored.config()
    made.task = {'ref': f'{HERE}:{task}'}
    made.evals.dev.data.batch_size = 32  # More than the 21 examples: the batch has padding.
    made.update(changes)
    return made


@pytest.mark.parametrize(
    'changes',
    [
        {},
        pytest.param({'accumulate': 2}, marks=pytest.mark.slow),
        pytest.param({'ensemble': {'size': 2}}, marks=pytest.mark.slow),
    ],
)
def test_the_first_batch_is_written_without_padding(
    changes: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    trainer(config('showing', **changes), tmp_path / 'run').fit()
    directory = tmp_path / 'run' / 'summaries' / '2' / 'eval' / 'dev'
    x = scored.Points(n=21, seed=1).gather(np.arange(21))['x']
    grid = np.asarray(Image.open(directory / 'inputs.png'))
    assert grid.shape == (8, 8)
    first = np.round(255 / (1 + np.exp(-x[0])))
    np.testing.assert_allclose(grid[:2, :2].ravel(), first, atol=1)
    arrays = np.load(directory / 'all.npz')
    np.testing.assert_array_equal(arrays['x'], x)
    assert np.load(directory / 'nested' / 'loss.npz')['counts'].sum() == 21
    # Not training, whose rows are as without them.
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
    assert not any('inputs' in name or 'nested' in name for row in rows for name in row)


def test_only_the_first_batch_is_computed() -> None:
    made = config('showing')
    made.evals.dev.data.batch_size = 8
    values = trainer(made).evaluate(trainer(made).init_state())['dev']
    assert values.summaries['all'].arrays['x'].shape == (8, 4)
    assert values.summaries['inputs'].images.shape == (8, 2, 2, 1)


def test_training_does_not_compute_summaries() -> None:
    """The compiled step is the same as without them, but for names."""
    flops = []
    for task in ('showing', 'without'):
        programs = trainer(config(task)).set_up().programs
        flops.append(programs.step.flops())
    assert flops[0] == flops[1]


def without(model: Any, batch: Mapping[str, Any]) -> TaskOutput:
    output = showing(model, batch)
    return TaskOutput(loss=output.loss, weights=output.weights)


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        ('bare', r"bare returned the summary 'x', float32\[.*; expected Images, Histogram or Arr"),
        ('constant', r"returned the summary 'x', Histogram; expected .*computed from the batch"),
        ('no_rows', r"summary 'x' of float32\[\]; expected one entry for each of the 16 examples"),
        ('no_images', r"summary 'x': Images: expected uint8 values from 0 to 255"),
    ],
)
def test_summaries_that_a_task_cannot_return(task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(config(task)).fit()


@pytest.mark.slow
def test_several_processes_write_what_one_writes(tmp_path: pathlib.Path) -> None:
    task = f'--config.task={json.dumps({"ref": f"{HERE}:showing"})}'
    # Two batches of 12, of which each process has a half: the first has no padding.
    given = (
        f'--config={CONFIG}:score', task,
        '--config.evals.dev.score=None', '--config.evals.dev.data.batch_size=12',
    )  # fmt: skip
    codes, _, errors = group.finish(group.start(2, tmp_path, config=given, devices=2))
    assert codes == [0, 0], errors
    arrays = np.load(tmp_path / 'summaries' / '2' / 'eval' / 'dev' / 'all.npz')
    x = scored.Points(n=21, seed=1).gather(np.arange(12))['x']
    np.testing.assert_array_equal(arrays['x'], x)
