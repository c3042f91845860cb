# SPDX-License-Identifier: Apache-2.0
"""The commands in each --help are valid."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests import command

LAUNCH = command.ROOT / 'launch'
SCRIPTS = ('processes.py', 'slurm.py', 'tpu_pod.py', 'gke.py')


def examples(script: str) -> list[str]:
    text = subprocess.run(
        [sys.executable, LAUNCH / script, '--help'], capture_output=True, text=True, check=True
    ).stdout
    joined = re.sub(r' *\\\n *', ' ', text)
    lines = re.findall(rf'^  launch/{script} .*', joined, flags=re.MULTILINE)
    # Brackets mark optional flags; here all of them are passed.
    return [re.sub(r'\[(.*?)\]', r'\1', line.split(' #')[0]).strip() for line in lines]


def check(line: str, cwd: pathlib.Path) -> None:
    """Checks a command by a dry run, in a directory that counts as shared."""
    script, *arguments = shlex.split(line.removesuffix(' | kubectl apply -f -'))
    dry = [] if script.endswith('gke.py') else ['--dry_run']
    if script.endswith('slurm.py'):
        dry.append('--chdir=/shared')
    border = arguments.index('--') if '--' in arguments else len(arguments)
    words = [*arguments[:border], *dry, *arguments[border:]]
    done = subprocess.run(
        [sys.executable, command.ROOT / script, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_commands_in_help_are_valid(script: str, tmp_path: pathlib.Path) -> None:
    lines = examples(script)
    assert len(lines) >= 2
    for line in lines:
        check(line, tmp_path)


def test_readme_lists_all_launchers() -> None:
    """`tests/test_page_commands.py` checks its commands, with `check`."""
    text = (LAUNCH / 'README.md').read_text()
    assert all(f'launch/{script}' in text for script in SCRIPTS)
    assert all(os.access(LAUNCH / script, os.X_OK) for script in SCRIPTS)
