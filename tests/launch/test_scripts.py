# SPDX-License-Identifier: Apache-2.0
"""launch/: the environment is created once, repaired, and updated with the lock file."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests import command

ARGUMENTS = ['--config=a b', '--x={"y": 1}']
MAIN = """
import os, sys
print('ran', sys.argv[1:], 'in', os.getcwd(), 'from', __file__)
"""


class Checkout:
    """A checkout with the real scripts, an empty lock file, and a program that reports its run."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        shutil.copytree(command.ROOT / 'launch', root / 'launch')
        self.lock = root / 'requirements.lock'
        self.lock.write_text('# nothing\n')
        (root / 'trainer').mkdir()
        (root / 'trainer' / '__init__.py').write_text('')
        (root / 'trainer' / 'main.py').write_text(MAIN)

    def start(self, cwd: pathlib.Path, path: str | None = None) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHON')}
        env = {**kept, 'PYTHON': sys.executable} if path is None else {**kept, 'PATH': path}
        return subprocess.Popen(
            ['/bin/bash', str(self.root / 'launch' / 'local.sh'), *ARGUMENTS],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, cwd: pathlib.Path, path: str | None = None) -> tuple[int, str, str]:
        process = self.start(cwd, path)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path / 'a checkout')


def ran(out: str, cwd: pathlib.Path, checkout: Checkout) -> bool:
    main = checkout.root / 'trainer' / 'main.py'
    return out == f'ran {ARGUMENTS} in {cwd} from {main}\n'


@pytest.mark.slow
def test_environment_is_created_once_and_runs_in_the_current_directory(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    code, out, err = checkout.run(tmp_path)
    assert code == 0, err
    assert ran(out, tmp_path, checkout)
    assert 'Creating ' in err and 'Python 3.' in err
    code, out, err = checkout.run(tmp_path)
    assert (code, err) == (0, '')
    assert ran(out, tmp_path, checkout)


@pytest.mark.parametrize('name', ['trainer.py', 'trainer/__init__.py'])
def test_a_file_that_hides_the_package(
    name: str, checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    """Python would run it, or fail with words that do not name it."""
    project = tmp_path / 'project'
    (project / name).parent.mkdir(parents=True)
    (project / name).write_text('')
    code, out, err = checkout.run(project)
    assert (code, out) == (2, '')
    assert err.startswith(f'Error: {project}/{name} hides')
    assert 'Rename it' in err


@pytest.mark.slow
def test_environment_is_recreated_when_it_is_stale(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    assert checkout.run(tmp_path)[0] == 0
    checkout.lock.write_text('# still nothing\n')
    assert 'Creating ' in checkout.run(tmp_path)[2]
    # The stamp is written last, so this looks like an interrupted installation.
    (checkout.root / '.venv' / 'stamp').unlink()
    assert 'Creating ' in checkout.run(tmp_path)[2]
    (checkout.root / '.venv' / 'bin' / 'python').unlink()
    assert 'Creating ' in checkout.run(tmp_path)[2]
    checkout.root = checkout.root.rename(tmp_path / 'moved')
    code, out, err = checkout.run(tmp_path)
    assert code == 0 and 'Creating ' in err
    assert ran(out, tmp_path, checkout)


@pytest.mark.slow
def test_concurrent_starts_create_one_environment(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    if not shutil.which('flock'):
        pytest.skip('needs the package util-linux, for flock')
    processes = [checkout.start(tmp_path) for _ in range(3)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert all(ran(out, tmp_path, checkout) for out, _ in ends)
    assert sum('Creating ' in err for _, err in ends) == 1


def tools(directory: pathlib.Path, *names: str) -> str:
    """Returns a PATH with these tools only."""
    directory.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (directory / name).symlink_to(found)
    return str(directory)


def test_missing_python_is_reported(checkout: Checkout, tmp_path: pathlib.Path) -> None:
    path = tools(tmp_path / 'bin', 'bash', 'dirname', 'cat', 'cmp')
    code, out, err = checkout.run(tmp_path, path)
    assert (code, out) == (2, '')
    assert 'Python 3.11 or newer is needed, and none was found on the PATH.' in err
    assert 'PYTHON=/path/to/python3' in err


@pytest.mark.slow
def test_pip_is_used_without_uv_and_flock(checkout: Checkout, tmp_path: pathlib.Path) -> None:
    path = tools(tmp_path / 'bin', 'bash', 'dirname', 'cat', 'cmp')
    base = pathlib.Path(sys.base_prefix) / 'bin' / f'python{sysconfig.get_python_version()}'
    (tmp_path / 'bin' / 'python3').symlink_to(base)
    code, out, err = checkout.run(tmp_path, path)
    assert code == 0, err
    assert ran(out, tmp_path, checkout)


@pytest.mark.slow
def test_failed_installation_is_reported_and_repeated(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    # Without a hash: both installers reject it before they access the network.
    checkout.lock.write_text('absl-py==2.5.1\n')
    for _ in range(2):
        code, out, err = checkout.run(tmp_path)
        assert (code, out) == (1, '')
        assert 'Error: installing requirements.lock into' in err


def test_lock_is_complete_and_names_no_index() -> None:
    text = (command.ROOT / 'requirements.lock').read_text()
    logical = text.replace('\\\n', ' ').splitlines()
    pins = [line for line in logical if line.strip() and not line.lstrip().startswith('#')]
    assert len(pins) > 50
    for pin in pins:
        assert '==' in pin and '--hash=sha256:' in pin, pin
    assert '://' not in text and 'file:' not in text and 'index-url' not in text
