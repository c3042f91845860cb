# SPDX-License-Identifier: Apache-2.0
"""Warnings about the config at the start of a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.command import ROOT
from trainer.experiment import load_and_build
from trainer.run import checks
from trainer.run.events import Events

BEST = {'metric': 'eval/test/accuracy', 'mode': 'max'}
EVERY = "config.evals.test.every='30 steps' and config.checkpoint.every='20 steps'"


def collect_warnings(caplog: pytest.LogCaptureFixture, **overrides: Any) -> str:
    options = {
        'train_for': '50 steps',
        'data__source__limit': 64,
        'evals__test__data__source__limit': 64,
        'evals__test__every': '30 steps',
        'checkpoint__every': '20 steps',
        'checkpoint__best': BEST,
    }
    path = str(ROOT / 'configs' / 'mnist_mlp.py')
    experiment = load_and_build(path, **{**options, **overrides})
    with caplog.at_level(logging.WARNING, 'trainer'):
        checks.warn_of_best(experiment, Events.from_experiment(experiment))
    messages = [record.message for record in caplog.records]
    assert len(messages) < 2
    return ''.join(messages)


@pytest.mark.parametrize(
    'overrides',
    [
        {},
        {'train_for': '59 steps'},
        {'evals__test__every': '35.5 steps', 'checkpoint__every': '35 steps'},
        {'checkpoint__every': 'never'},
    ],
)
def test_warns_if_only_the_last_checkpoint_can_be_best(
    caplog: pytest.LogCaptureFixture, overrides: Any
) -> None:
    text = collect_warnings(caplog, **overrides)
    assert text.startswith('config.checkpoint.best: only the last checkpoint can be the best. ')
    wanted = overrides.get('evals__test__every', '30 steps')
    assert text.endswith(f': set --config.checkpoint.every={wanted!r}')


def test_warns_if_no_checkpoint_can_be_best(caplog: pytest.LogCaptureFixture) -> None:
    text = collect_warnings(caplog, evals__test__final=False)
    assert text == (
        f'config.checkpoint.best: no checkpoint can be the best. {EVERY} have no step in common '
        'before the end of this run (50 steps), and a checkpoint is ranked by an evaluation at the '
        "same step: set --config.checkpoint.every='30 steps', or leave out "
        'config.evals.test.final=False'
    )


def test_warns_of_an_evaluation_that_never_runs(caplog: pytest.LogCaptureFixture) -> None:
    text = collect_warnings(caplog, evals__test__final=False, evals__test__every='never')
    assert 'no checkpoint can be the best' in text
    assert text.endswith("set --config.evals.test.every='20 steps'")


@pytest.mark.parametrize(
    'overrides',
    [
        {'checkpoint__best': None},
        # They meet at 60.
        {'train_for': '61 steps'},
        {'checkpoint__every': '15 steps'},
        {'evals__test__every': '10 steps'},
        {'evals__test__every': '0.5 steps'},
        # There is one evaluation, and it is saved.
        {'evals__test__every': 'never'},
        {'train_for': '25 steps'},
        {'train_for': '30 steps', 'evals__test__final': False},
    ],
)
def test_no_warning_if_several_checkpoints_can_be_best(
    caplog: pytest.LogCaptureFixture, overrides: Any
) -> None:
    assert collect_warnings(caplog, **overrides) == ''
