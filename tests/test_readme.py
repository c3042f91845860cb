# SPDX-License-Identifier: Apache-2.0
"""Everything that the README shows works: its files are written, its commands are run."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests import command

README = (command.ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, flags=re.DOTALL)
FILES = {
    match[1]: text
    for kind, text in BLOCKS
    if kind == 'python' and (match := re.match(r'# ([\w/]+\.py)\n', text))
}
COMMANDS = [
    line.split('   #')[0].strip()
    for kind, text in BLOCKS
    if kind == 'bash'
    for line in text.splitlines()
]


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory of the user's own, with the README's files and nothing of ours."""
    root = tmp_path_factory.mktemp('project')
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_readme_has_what_this_file_looks_for() -> None:
    assert len(FILES) == 17
    assert COMMANDS[:2] == ['launch/local.sh --config=configs/mnist.py', 'launch/test.sh']
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize('line', [c for c in COMMANDS if c != 'launch/test.sh'])
def test_command(line: str, project: pathlib.Path) -> None:
    """As it stands, but for a shorter run."""
    name, *args = shlex.split(line)
    assert name in ('python', 'launch/local.sh')
    args = args[args.index('trainer.main') + 1 :] if name == 'python' else args
    if 'mode=' not in line and 'helpconfig' not in line and '=mine/' not in line:
        args += ['--config.train_for=3steps']
    finished = command.run(*args, cwd=project)
    assert finished.code == 0, finished.err
    if '=mine/' in line:
        assert finished.out.count('hook: step') == 2
        assert 'eval sure at step 100' in finished.out
        assert 'examples 77' in finished.out


def script(name: str, project: pathlib.Path) -> str:
    """Returns what one of the files prints."""
    done = subprocess.run(
        [sys.executable, name],
        cwd=project,
        env={**os.environ, 'PYTHONPATH': str(command.ROOT), 'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_notebook(project: pathlib.Path) -> None:
    printed = script('notebook.py', project)
    assert 'resumed from step 100' in printed
    assert 'finished' in printed


def test_full_evaluation(project: pathlib.Path) -> None:
    """B1, B2, B4, B5, B6: the numbers of the guide's notebook, on eight devices; one program."""
    printed = script('full_evaluation.py', project)
    assert re.search(r"'accuracy': 0\.0979+\d*, 'examples': 10000\b", printed)
    assert printed.count('compiled for') == 1
    assert printed.splitlines()[-1] == '980 [  980 10000]'


def test_generation(project: pathlib.Path) -> None:
    written = re.findall(r"b['\"]", script('generate.py', project).splitlines()[-1])
    assert len(written) == 2
