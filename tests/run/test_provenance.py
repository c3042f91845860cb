# SPDX-License-Identifier: Apache-2.0
"""What a run records about its code."""

from __future__ import annotations

import json
import pathlib
import subprocess
import threading
import time
from typing import Any

import pytest

from tests import small
from tests.command import ROOT
from trainer.run import provenance
from trainer.trainer import Trainer


def git(directory: pathlib.Path, *words: str) -> str:
    user = ('-c', 'user.name=n', '-c', 'user.email=a@b', '-c', 'init.defaultBranch=main')
    command = ['git', *user, *words]
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def make_repository(directory: pathlib.Path) -> pathlib.Path:
    """Returns a new repository of one commit."""
    directory.mkdir(parents=True)
    git(directory, 'init', '-q')
    (directory / 'model.py').write_text('one = 1\n')
    git(directory, 'add', '.')
    git(directory, 'commit', '-qm', 'first')
    return directory


def test_a_clean_repository(tmp_path: pathlib.Path) -> None:
    repo = make_repository(tmp_path / 'repo')
    (repo / 'deep').mkdir()
    found = provenance.inspect_code(repo / 'deep', None)
    assert found.diffs == {}
    assert found.about['git'] == {
        'directory': str(repo),
        'commit': git(repo, 'rev-parse', 'HEAD'),
        'branch': 'main',
        'dirty': False,
        'diff': None,
        'untracked': [],
    }
    assert 'config_git' not in found.about


@pytest.mark.slow
def test_changes_and_untracked_files(tmp_path: pathlib.Path) -> None:
    repo = make_repository(tmp_path / 'repo')
    (repo / 'model.py').write_text('one = 2\n')
    for i in range(150):
        (repo / f'new {i:03}.py').write_text('')
    found = provenance.inspect_code(repo, None)
    about = found.about['git']
    assert (about['dirty'], about['diff']) == (True, 'code.diff')
    assert about['untracked'][:2] == ['new 000.py', 'new 001.py']
    assert len(about['untracked']) + about['untracked_left_out'] == 150
    # Applying it to the commit gives the code that ran.
    diff = tmp_path / 'code.diff'
    diff.write_bytes(found.diffs['code.diff'])
    git(repo, 'checkout', '-q', '.')
    git(repo, 'apply', str(diff))
    assert (repo / 'model.py').read_text() == 'one = 2\n'
    # It and a concurrent commit do not block each other.
    (repo / '.git' / 'index.lock').write_text('')
    assert provenance.inspect_code(repo, None).about['git']['dirty'] is True


def test_a_large_diff_is_truncated(tmp_path: pathlib.Path) -> None:
    repo = make_repository(tmp_path / 'repo')
    (repo / 'model.py').write_text('x' * 99 + '\n' + ('y' * 99 + '\n') * 50_000)
    diff = provenance.inspect_code(repo, None).diffs['code.diff']
    assert len(diff) < 1_100_000
    assert diff.rstrip().endswith(b'[truncated after 1,048,576 bytes]')


def test_no_repository_no_commit_and_detached_head(tmp_path: pathlib.Path) -> None:
    assert provenance.inspect_code(tmp_path, None).about['git'] is None
    empty = tmp_path / 'empty'
    empty.mkdir()
    git(empty, 'init', '-q')
    about = provenance.inspect_code(empty, None).about['git']
    assert (about['commit'], about['branch'], about['dirty']) == (None, 'main', False)
    repo = make_repository(tmp_path / 'detached')
    git(repo, 'checkout', '-q', '--detach')
    about = provenance.inspect_code(repo, None).about['git']
    assert (about['commit'], about['branch']) == (git(repo, 'rev-parse', 'HEAD'), None)


@pytest.mark.slow
def test_the_repository_of_the_config(tmp_path: pathlib.Path) -> None:
    mine, its = make_repository(tmp_path / 'mine'), make_repository(tmp_path / 'its')
    (its / 'model.py').write_text('one = 3\n')
    found = provenance.inspect_code(mine, its / 'config.py')
    assert found.about['git']['directory'] == str(mine)
    assert found.about['config_git']['directory'] == str(its)
    assert found.about['config_git']['diff'] == 'config.diff'
    assert list(found.diffs) == ['config.diff']
    assert 'config_git' not in provenance.inspect_code(mine, mine / 'configs' / 'mnist.py').about
    # For the trainer's own configs, it is recorded under `trainer`.
    assert 'config_git' not in provenance.inspect_code(mine, ROOT / 'configs' / 'mnist.py').about


def test_the_version_of_the_trainer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = provenance.inspect_code(tmp_path, None).about['trainer']
    assert about['version']
    if (ROOT / '.git').exists():
        assert about['commit'].removesuffix('-dirty') == git(ROOT, 'rev-parse', 'HEAD')
    # Installed in a virtual environment inside a repository of the user's.
    repo = make_repository(tmp_path / 'repo')
    installed = repo / '.venv' / 'trainer'
    installed.mkdir(parents=True)
    (installed / '__init__.py').write_text('')
    monkeypatch.setattr(provenance, '_HERE', installed)
    assert provenance.inspect_code(tmp_path, None).about['trainer']['commit'] is None


def fake_git(directory: pathlib.Path, script: str) -> pathlib.Path:
    """Creates a fake git executable."""
    directory.mkdir()
    (directory / 'git').write_text(f'#!/bin/sh\n{script}\n')
    (directory / 'git').chmod(0o755)
    return directory


def test_git_that_is_missing_or_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path, fake_git(tmp_path / 'bin', 'exit 1')):
        monkeypatch.setenv('PATH', str(path))
        found = provenance.inspect_code(ROOT, ROOT / 'configs' / 'mnist.py')
        assert found.about['git'] is None
        assert found.about['trainer']['commit'] is None


def test_a_slow_git_is_killed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', f'{fake_git(tmp_path / "bin", "exec sleep 60")}:/usr/bin:/bin')
    monkeypatch.setattr(provenance, '_TIMEOUT_SECS', 0.1)
    began = time.monotonic()
    assert provenance.inspect_code(tmp_path, None).about['git'] is None
    assert time.monotonic() - began < 5


def run_json(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / 'run.json').read_text())


def trainer_in(workdir: pathlib.Path) -> Trainer:
    return small.trainer_in(workdir, train_for='4 steps')


@pytest.mark.slow
def test_a_run_records_its_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, workdir = make_repository(tmp_path / 'repo'), tmp_path / 'run'
    (repo / 'model.py').write_text('one = 2\n')
    monkeypatch.chdir(repo)
    trainer_in(workdir).fit()
    run = run_json(workdir)
    assert run['git']['commit'] == git(repo, 'rev-parse', 'HEAD')
    assert run['git']['diff'] == 'code.diff'
    assert '+one = 2' in (workdir / 'code.diff').read_text()
    assert run['trainer']['version']
    assert run['devices']['count'] == 8
    assert run['devices']['platform'] == 'cpu'
    assert run['devices']['processes'] == 1
    # A later start with clean code: the files are those of the last start.
    git(repo, 'checkout', '-q', '.')
    trainer_in(workdir).fit()
    assert run_json(workdir)['git']['dirty'] is False
    assert not (workdir / 'code.diff').exists()


@pytest.mark.slow
def test_a_run_does_not_wait_for_a_slow_git(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    look = provenance.inspect_code

    def slow(directory: pathlib.Path, config: pathlib.Path | None) -> provenance.Code:
        asked.set()
        answer.wait(60)
        return look(directory, config)

    monkeypatch.setattr(provenance, 'inspect_code', slow)
    trainer = trainer_in(tmp_path)
    trainer.fit(max_steps=2)
    assert asked.is_set()
    run = run_json(tmp_path)
    assert (run['status'], 'git' in run) == ('paused', False)
    # After the run, nothing is written to files that may belong to another one by then.
    (tmp_path / 'code.diff').write_text('of another run')
    answer.set()
    for thread in threading.enumerate():
        if thread.name == 'provenance':
            thread.join(60)
    assert run_json(tmp_path) == run
    assert (tmp_path / 'code.diff').read_text() == 'of another run'


def test_code_is_delivered_whenever_it_is_asked_for() -> None:
    found: list[provenance.Code] = []
    inspector = provenance.CodeInspector(None)
    inspector.deliver_to(found.append)
    for thread in threading.enumerate():
        if thread.name == 'provenance':
            thread.join(60)
    assert len(found) == 1
    inspector.deliver_to(found.append)
    assert len(found) == 2
