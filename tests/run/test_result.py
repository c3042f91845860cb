# SPDX-License-Identifier: Apache-2.0
"""What `fit` returns and prints in a notebook."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from tests.in_memory import make_config
from trainer import Trainer, build
from trainer.config.errors import UserError


def test_the_history_has_the_steps_and_values_of_each_metric() -> None:
    trainer = Trainer(build(make_config()))
    first = trainer.fit(max_steps=4)
    result = trainer.fit()
    column = result.history['train/loss']
    assert (column.steps.tolist(), column.values.dtype) == ([4, 8], np.float64)
    assert result.history['eval/dev/loss'].steps.tolist() == [4, 8]
    assert column.values[-1] == result.metrics['train/loss']
    assert first.history['train/loss'].steps.tolist() == [4]
    steps, values = column  # As `plt.plot(*column)` takes it.
    assert steps.shape == values.shape == (2,)


def test_the_history_of_a_resumed_run_is_that_of_its_file(tmp_path: pathlib.Path) -> None:
    workdir = str(tmp_path / 'run')
    Trainer(build(make_config()), workdir).fit(max_steps=4)
    history = Trainer(build(make_config()), workdir).fit().history
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
    for name in ('train/loss', 'eval/dev/loss', 'train/learning_rate'):
        pairs = [(row['step'], row[name]) for row in rows if name in row]
        assert list(zip(*map(np.ndarray.tolist, history[name]), strict=True)) == pairs
        assert [step for step, _ in pairs] == [4, 8]


def test_pandas_reads_a_column() -> None:
    pandas = pytest.importorskip('pandas')
    history = Trainer(build(make_config())).fit().history
    frame = pandas.DataFrame({n: pandas.Series(c.values, c.steps) for n, c in history.items()})
    assert frame.index.tolist() == [4, 8]
    assert frame['train/loss'].notna().all()


def test_what_a_notebook_shows_is_a_few_lines_without_arrays() -> None:
    trainer = Trainer(build(make_config()))
    result = trainer.fit()
    lines = repr(result).splitlines()
    assert lines[0] == "Result(status='finished', step=8)"
    assert lines[1:] == [
        f'  train: loss {result.metrics["train/loss"]:.5g}',
        f'  eval/dev: loss {result.metrics["eval/dev/loss"]:.5g}, examples 21',
    ]
    # 4 x 8 + 8 + 8 x 2 + 2 parameters; Adam has two moments of each, and a count.
    assert repr(result.state).startswith('TrainState(step=8; numbers in params 58, opt_state 11')
    assert repr(trainer.set_up().programs.abstract).startswith('TrainState(step=?; ')
    assert repr(trainer.experiment).splitlines() == [
        'Experiment(a ConfigDict)',
        '  model      tests.in_memory:Net',
        '  task       tests.in_memory:Task',
        '  data       tests.in_memory:Points',
        '  optimizer  optax:adam',
        '  training   8 steps of 16 examples',
        '  evals      dev',
    ]


def test_verbose_false_prints_nothing_and_writes_the_same_files(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / 'run'
    Trainer(build(make_config()), str(workdir), verbose=False).fit()
    assert capfd.readouterr() == ('', '')
    assert len((workdir / 'metrics.jsonl').read_text().splitlines()) == 4
    assert json.loads((workdir / 'result.json').read_text())['status'] == 'finished'


def test_disabled_jit_is_refused_with_a_sentence() -> None:
    trainer = Trainer(build(make_config()))
    with jax.disable_jit(), pytest.raises(UserError, match=r'cannot run under jax\.disable_jit'):
        trainer.fit()
    assert trainer.fit().status == 'finished'
