# SPDX-License-Identifier: Apache-2.0
"""A test run in which a test crashes its process."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests import crash
from tests.command import ROOT

STACKS = """Fatal Python error: Segmentation fault

Thread 0x01 (most recent call first):
  File "waits.py", line 1 in wait

Current thread 0x02 (most recent call first):
  File "falls.py", line 1 in fall

Extension modules: numpy, jaxlib (total: 2)
"""

CRASHING = """
import ctypes, time, pytest
def test_before(): time.sleep(1)
def test_falls(): ctypes.string_at(0)
def test_behind(): pass
"""


def test_the_thread_that_crashed_comes_first() -> None:
    assert crash.shorten_stacks(STACKS).splitlines() == [
        'Fatal Python error: Segmentation fault',
        '',
        'Current thread 0x02 (most recent call first):',
        '  File "falls.py", line 1 in fall',
        '',
        'Thread 0x01 (most recent call first):',
        '  File "waits.py", line 1 in wait',
    ]


def test_deep_stacks_are_truncated() -> None:
    deep = 'Current thread 0x02:\n' + '\n'.join(f'  line {i}' for i in range(50))
    lines = crash.shorten_stacks(deep).splitlines()
    assert lines[1] == '  line 0' and lines[-1] == '  ... and 31 more' and len(lines) == 21


@pytest.mark.slow
@pytest.mark.parametrize('ci', ['', 'true'])
def test_a_crash_names_its_test_and_the_others_run(tmp_path: pathlib.Path, ci: str) -> None:
    (tmp_path / 'conftest.py').write_text("pytest_plugins = ('tests.crash',)\n")
    for name in ('test_one.py', 'test_other.py'):
        (tmp_path / name).write_text(CRASHING)
    (tmp_path / 'tmp').mkdir()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path / 'tmp'), 'CI': ci}
    for name in [name for name in env if name.startswith('PYTEST_')]:
        del env[name]  # Or the inner run would take itself for a worker of this one.
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-n',
        '2',
        '--dist',
        'loadfile',
        '-p',
        'no:cacheprovider',
    ]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr
    assert '2 failed, 4 passed' in found.stdout
    for name in ('test_one.py', 'test_other.py'):
        assert f'FAILED {name}::test_falls' in found.stdout
    assert found.stdout.count('in test_falls') == 2
    assert 'Extension modules' not in found.stdout + found.stderr
    assert not list((tmp_path / 'tmp').glob('pytest-crash-*'))
