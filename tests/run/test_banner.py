# SPDX-License-Identifier: Apache-2.0
"""The summary that is printed before the first step."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from tests.step import tiny
from trainer.run import banner
from trainer.trainer import Trainer


def summary(trainer: Trainer, step: int = 0) -> str:
    setup = trainer.set_up()
    state = setup.programs.abstract
    return banner.summary(trainer.experiment, state, setup.mesh, trainer.workdir, step)


def lines_of(trainer: Trainer, step: int = 0) -> dict[str, str]:
    """Returns the lines below the table, by their first word."""
    pairs = (
        line.split(maxsplit=1) for line in summary(trainer, step).split('\n\n')[-1].splitlines()
    )
    return {words[0]: words[1] for words in pairs}


def test_what_runs_where(tmp_path: pathlib.Path) -> None:
    lines = lines_of(tiny.trainer(tmp_path / 'run', evals={}))
    assert lines['devices'].endswith('(cpu), mesh data 8')
    assert lines['batch'] == 'size   32 (4 per device)'
    assert lines['training'] == '20 steps = 2.5 epochs of 8 steps'
    assert lines['workdir'] == str(tmp_path / 'run')
    assert lines['starting'] == 'from scratch'
    assert lines['train'].startswith('state  ') and lines['train'].endswith(' per device')


def test_a_model_axis_does_not_divide_the_batch() -> None:
    lines = lines_of(tiny.trainer(evals={}, mesh={'data': 2, 'model': 4}))
    assert lines['devices'].endswith('mesh data 2 x model 4')
    assert lines['batch'] == 'size   32 (16 per device)'
    assert lines['workdir'] == 'none (nothing is written)'


def test_a_resumed_run_says_its_step() -> None:
    assert lines_of(tiny.trainer(evals={}), 1234)['resuming'] == 'from step 1,234'


@pytest.mark.parametrize(
    ('train_for', 'batch_size', 'text'),
    [
        ('1 epochs', 32, '8 steps = 1 epoch of 8 steps'),
        ('3 epochs', 100, '8 steps = 3.125 epochs of about 3 steps'),
    ],
)
def test_the_length_in_epochs(train_for: str, batch_size: int, text: str) -> None:
    data = {'source': tiny.SOURCE, 'batch_size': batch_size}
    trainer = tiny.trainer(evals={}, train_for=train_for, data=data, mesh={'data': 4, 'model': 2})
    assert lines_of(trainer)['training'] == text


def test_a_stream_has_no_epochs() -> None:
    loader = {'target': 'trainer.data.streaming:StreamLoader'}
    data = {'source': tiny.SOURCE, 'batch_size': 32, 'loader': loader}
    assert lines_of(tiny.trainer(evals={}, data=data))['training'] == '20 steps'


def test_members_of_an_ensemble_are_listed() -> None:
    vary: dict[str, Any] = {'optimizer': {'learning_rate': (0.1, 0.2)}}
    trainer = tiny.trainer(evals={}, ensemble={'size': 2, 'vary': vary})
    text = summary(trainer)
    assert 'ensemble     2 members\n  member 0  ' in text
    assert '0.2' in text.splitlines()[-1]
