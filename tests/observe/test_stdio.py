# SPDX-License-Identifier: Apache-2.0
"""A run whose standard output or error was closed before it started."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests import command


@pytest.mark.slow
@pytest.mark.parametrize('closed', ['>&-', '2>&-'])
def test_a_closed_output_does_not_end_the_run(closed: str, tmp_path: pathlib.Path) -> None:
    words = [sys.executable, '-m', 'trainer.main', command.MLP, *command.SMALL]
    words += ['--config.train_for=3steps', f'--workdir={tmp_path}']
    environ = {**os.environ, 'PYTHONPATH': str(command.ROOT)}
    line = f'{shlex.join(words)} {closed}'
    finished = subprocess.run(line, shell=True, cwd=command.ROOT, env=environ, timeout=120)
    assert finished.returncode == 0
    assert command.result(tmp_path)['status'] == 'finished'
