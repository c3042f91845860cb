# SPDX-License-Identifier: Apache-2.0
"""Thousands of steps on virtual devices, without a row that would wait for them."""

import os
import subprocess
import sys

import pytest

from tests import command
from tests.command import ROOT

PROGRAM = """
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

experiment = load_and_build(
    'configs/mnist_mlp.py',
    data__source__limit=4000,
    train_for='2500 steps',
    log__every='2500 steps',
    evals__test__every='never',
    evals__test__final=False,
)
print('step', Trainer(experiment).fit().step)
"""


@pytest.mark.slow
def test_programs_in_flight_are_limited_on_virtual_devices():
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': command.xla_flags(8),
    }
    result = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert 'step 2500' in result.stdout
