# SPDX-License-Identifier: Apache-2.0
"""Records the code of a run: the git state of the user's repositories and the trainer's version.

git runs in a thread with time limits, so that a large repository or a slow disk neither stops nor
delays a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import subprocess
import threading
import tomllib
from collections.abc import Callable
from typing import Any

_DISTRIBUTION = 'jax-config-trainer'
_HERE = pathlib.Path(__file__).resolve().parents[1]
_TIMEOUT_SECS = 20.0
# A larger diff is hardly code: a data file has changed.
_MAX_DIFF_BYTES = 1 << 20
_MAX_STATUS_BYTES = 1 << 22
_MAX_NAMES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """The state of a git repository.

    Attributes:
        directory: root of its working tree.
        commit: the one that is checked out; None before the first commit.
        branch: None for a detached head.
        dirty: whether tracked files differ from the commit; None if git took too long.
        untracked: files and directories that git neither tracks nor ignores.
        diff: `git diff` of the tracked files, possibly truncated.
    """

    directory: str
    commit: str | None
    branch: str | None
    dirty: bool | None
    untracked: tuple[str, ...] = ()
    diff: bytes = b''

    def as_entry(self, diff: str | None = None) -> dict[str, Any]:
        """Returns its entry in `run.json`.

        Args:
            diff: name of the file that holds the diff.
        """
        names = self.untracked[:_MAX_NAMES]
        about: dict[str, Any] = {
            'directory': self.directory,
            'commit': self.commit,
            'branch': self.branch,
            'dirty': self.dirty,
            'diff': diff if self.diff else None,
            'untracked': list(names),
        }
        if len(names) < len(self.untracked):
            about['untracked_left_out'] = len(self.untracked) - len(names)
        return about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """The code of a run.

    Attributes:
        about: fields of `run.json`: 'git', 'config_git' if the config file is in another
            repository, 'trainer'.
        diffs: file name to content.
    """

    about: dict[str, Any]
    diffs: dict[str, bytes]


def inspect_code(directory: pathlib.Path, config: pathlib.Path | None) -> Code:
    """Returns the code of a run.

    Args:
        directory: the directory that the run was started in.
        config: the config file, or None if there is none.
    """
    user = repository(directory)
    about: dict[str, Any] = {'git': None}
    diffs: dict[str, bytes] = {}

    def add(field: str, state: Repository, name: str) -> None:
        about[field] = state.as_entry(name)
        if state.diff:
            diffs[name] = state.diff

    if user is not None:
        add('git', user, 'code.diff')
    # A config is often kept in a repository of its own, whose state matters as much. The trainer
    # has its own entry, so its example configs need no second one.
    root = None if config is None else _root(config.resolve().parent)
    if root is not None and root != _root(directory) and not _is_trainer(root):
        other = repository(root)
        if other is not None:
            add('config_git', other, 'config.diff')
    about['trainer'] = trainer_version()
    return Code(about=about, diffs=diffs)


def repository(directory: pathlib.Path) -> Repository | None:
    """Returns the repository of a directory, or None outside of git or if git does not answer."""
    root = _root(directory)
    if root is None:
        return None
    # A single command: in a large repository, the walk over the files takes most of the time.
    text = _git(root, 'status', '--porcelain=v2', '--branch', '-z', limit=_MAX_STATUS_BYTES)
    if text is None:
        # The status took too long or was refused; the commit alone can be read without walking the
        # files.
        head = _git(root, 'rev-parse', '--verify', '-q', 'HEAD')
        commit = head.decode().strip() if head else None
        return Repository(directory=str(root), commit=commit, branch=None, dirty=None)
    entries = text.decode(errors='replace').split('\0')
    headers = dict(e[2:].split(' ', 1) for e in entries if e.startswith('# branch.'))
    commit, branch = headers.get('branch.oid'), headers.get('branch.head')
    # Entries of the porcelain format begin with 1 (changed), 2 (renamed) or u (unmerged).
    dirty = any(entry[:2] in ('1 ', '2 ', 'u ') for entry in entries)
    commit = None if commit == '(initial)' else commit
    return Repository(
        directory=str(root),
        commit=commit,
        branch=None if branch == '(detached)' else branch,
        dirty=dirty,
        untracked=tuple(entry[2:] for entry in entries if entry.startswith('? ')),
        diff=_diff(root) if dirty and commit else b'',
    )


def trainer_version() -> dict[str, Any]:
    """Returns the version of the trainer, and its commit if it runs from a checkout."""
    about: dict[str, Any] = {'version': _version(), 'commit': None}
    root = _root(_HERE)
    # The repository around an installed trainer may be the user's, with a virtual environment.
    if root is not None and _is_trainer(root):
        text = _git(root, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
        about['commit'] = text.decode().strip() if text else None
    return about


class CodeInspector:
    """Inspects the code of a run in a thread."""

    def __init__(self, config: pathlib.Path | None):
        """Starts the thread; it inspects the current directory and that of the config file."""
        self._code: Code | None = None
        self._receiver: Callable[[Code], None] | None = None
        self._lock = threading.Lock()
        self._paths = pathlib.Path.cwd(), config
        # A daemon, so that a run can end while git is still busy.
        threading.Thread(target=self._inspect, name='provenance', daemon=True).start()

    def deliver_to(self, act: Callable[[Code], None]) -> None:
        """Calls a function with the code: now if it is known, otherwise later in the thread."""
        # Either this thread finds the code, or the other one finds the receiver: checking without
        # the lock could miss both.
        with self._lock:
            if self._code is None:
                self._receiver = act
                return
        with contextlib.suppress(OSError):
            act(self._code)

    def _inspect(self) -> None:
        try:
            code = inspect_code(*self._paths)
        except Exception as error:  # Not worth ending the run for.
            code = Code(about={'git': None, 'git_error': repr(error)}, diffs={})
        with self._lock:
            self._code, act = code, self._receiver
        if act is not None:
            with contextlib.suppress(OSError):
                act(code)


def _root(directory: pathlib.Path) -> pathlib.Path | None:
    text = _git(directory, 'rev-parse', '--show-toplevel')
    return pathlib.Path(os.fsdecode(text.rstrip(b'\n'))) if text else None


def _is_trainer(root: pathlib.Path) -> bool:
    # Being inside is not enough: an installed copy may be in an ignored directory of the user's
    # repository (`.venv`). Only a checkout tracks the files.
    if not _HERE.is_relative_to(root.resolve()):
        return False
    return bool(_git(root, 'ls-files', '--', str(_HERE / '__init__.py')))


def _diff(root: pathlib.Path) -> bytes:
    text = _git(root, 'diff', '--no-ext-diff', '--no-color', 'HEAD', limit=_MAX_DIFF_BYTES)
    return text or b''


def _git(directory: pathlib.Path, *args: str, limit: int = 1 << 16) -> bytes | None:
    """Returns git's output, truncated at `limit` bytes; None if it fails or takes too long."""
    # git's file system monitor would inherit the pipe and keep it open, and git's optional locks
    # could block a commit that the user makes meanwhile.
    command = ['git', '--no-optional-locks', '-c', 'core.fsmonitor=false', *args]
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # No prompt that would wait for an answer, and no translated output.
            env={**os.environ, 'GIT_TERMINAL_PROMPT': '0', 'LC_ALL': 'C'},
        )
    except OSError:
        return None
    # Not `communicate(timeout=...)`, which keeps all output in memory, however much there is.
    # Killing the process closes the pipe, which ends the read below.
    timer = threading.Timer(_TIMEOUT_SECS, process.kill)
    timer.daemon = True
    timer.start()
    with process:
        assert process.stdout is not None
        # One byte more than the limit shows whether there is more.
        text = process.stdout.read(limit + 1)
        if is_truncated := len(text) > limit:
            process.kill()
    timer.cancel()
    if is_truncated:
        return text[:limit] + f'\n[truncated after {limit:,} bytes]\n'.encode()
    return text if process.returncode == 0 else None


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(_DISTRIBUTION)
    project = _HERE.parent / 'pyproject.toml'
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = tomllib.loads(project.read_text())['project']
        return str(table['version']) if table['name'] == _DISTRIBUTION else None
    return None
