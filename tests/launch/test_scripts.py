# SPDX-License-Identifier: Apache-2.0
"""launch/: the environment is made once, repaired, and renewed with the lock."""

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
    """A checkout with the real scripts, a lock of nothing, and a program that says how it ran."""

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
def test_made_once_and_run_from_the_user_s_directory(
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
def test_a_changed_lock_an_interrupted_install_and_a_moved_checkout_start_again(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    assert checkout.run(tmp_path)[0] == 0
    checkout.lock.write_text('# still nothing\n')
    assert 'Creating ' in checkout.run(tmp_path)[2]
    # The stamp comes last, so this is how an interrupted install looks.
    (checkout.root / '.venv' / 'stamp').unlink()
    assert 'Creating ' in checkout.run(tmp_path)[2]
    (checkout.root / '.venv' / 'bin' / 'python').unlink()
    assert 'Creating ' in checkout.run(tmp_path)[2]
    checkout.root = checkout.root.rename(tmp_path / 'moved')
    code, out, err = checkout.run(tmp_path)
    assert code == 0 and 'Creating ' in err
    assert ran(out, tmp_path, checkout)


@pytest.mark.slow
def test_of_two_starts_at_once_one_makes_it(checkout: Checkout, tmp_path: pathlib.Path) -> None:
    if not shutil.which('flock'):
        pytest.skip('needs flock')
    processes = [checkout.start(tmp_path) for _ in range(3)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert all(ran(out, tmp_path, checkout) for out, _ in ends)
    assert sum('Creating ' in err for _, err in ends) == 1


def tools(directory: pathlib.Path, *names: str) -> str:
    """Returns a PATH of these tools alone."""
    directory.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (directory / name).symlink_to(found)
    return str(directory)


def test_without_a_python_the_user_is_told(checkout: Checkout, tmp_path: pathlib.Path) -> None:
    path = tools(tmp_path / 'bin', 'bash', 'dirname', 'cat', 'cmp')
    code, out, err = checkout.run(tmp_path, path)
    assert (code, out) == (2, '')
    assert 'Python 3.11 or newer is needed, and none was found on the PATH.' in err
    assert 'PYTHON=/path/to/python3' in err


@pytest.mark.slow
def test_without_uv_and_flock_pip_does_it(checkout: Checkout, tmp_path: pathlib.Path) -> None:
    path = tools(tmp_path / 'bin', 'bash', 'dirname', 'cat', 'cmp')
    base = pathlib.Path(sys.base_prefix) / 'bin' / f'python{sysconfig.get_python_version()}'
    (tmp_path / 'bin' / 'python3').symlink_to(base)
    code, out, err = checkout.run(tmp_path, path)
    assert code == 0, err
    assert ran(out, tmp_path, checkout)


@pytest.mark.slow
def test_a_failed_install_is_said_and_tried_again(
    checkout: Checkout, tmp_path: pathlib.Path
) -> None:
    # Without a hash, which both installers refuse before they look anywhere.
    checkout.lock.write_text('absl-py==2.5.1\n')
    for _ in range(2):
        code, out, err = checkout.run(tmp_path)
        assert (code, out) == (1, '')
        assert 'Error: installing requirements.lock into' in err


def test_the_lock_is_complete_and_names_no_index() -> None:
    text = (command.ROOT / 'requirements.lock').read_text()
    logical = text.replace('\\\n', ' ').splitlines()
    pins = [line for line in logical if line.strip() and not line.lstrip().startswith('#')]
    assert len(pins) > 50
    for pin in pins:
        assert '==' in pin and '--hash=sha256:' in pin, pin
    assert '://' not in text and 'file:' not in text and 'index-url' not in text
