# SPDX-License-Identifier: Apache-2.0
"""Records which code a run used: the user's repositories, and the trainer's own version.

git runs in a thread with time limits, so that no repository, however large or slow its disk,
stops or delays a run.
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
# A larger diff is not code: a data file was changed.
_MAX_DIFF_BYTES = 1 << 20
_MAX_STATUS_BYTES = 1 << 22
_MAX_NAMES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """The state of a git repository.

    Attributes:
        directory: its root.
        commit: the one that is checked out; None before the first.
        branch: None for a detached head.
        dirty: whether tracked files differ from the commit; None if git took too long.
        untracked: files and directories that git neither tracks nor ignores.
        diff: of the tracked files, possibly truncated.
    """

    directory: str
    commit: str | None
    branch: str | None
    dirty: bool | None
    untracked: tuple[str, ...] = ()
    diff: bytes = b''

    def about(self, diff: str | None = None) -> dict[str, Any]:
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
        about: fields of `run.json`: 'git', 'config_git' if that is a different one, 'trainer'.
        diffs: file name to content.
    """

    about: dict[str, Any]
    diffs: dict[str, bytes]


def look(directory: pathlib.Path, config: pathlib.Path | None) -> Code:
    """Returns the code of a run.

    Args:
        directory: the user's.
        config: the config file, or None if there is none.
    """
    user = repository(directory)
    about: dict[str, Any] = {'git': None}
    diffs: dict[str, bytes] = {}

    def add(field: str, found: Repository, name: str) -> None:
        about[field] = found.about(name)
        if found.diff:
            diffs[name] = found.diff

    if user is not None:
        add('git', user, 'code.diff')
    root = None if config is None else _root(config.resolve().parent)
    if root is not None and root != _root(directory) and not _is_trainer(root):
        other = repository(root)
        if other is not None:
            add('config_git', other, 'config.diff')
    about['trainer'] = trainer_version()
    return Code(about=about, diffs=diffs)


def repository(directory: pathlib.Path) -> Repository | None:
    """Returns the repository of a directory, None outside of git or if git does not answer."""
    root = _root(directory)
    if root is None:
        return None
    # One command for all: in a large repository, the walk over the files dominates.
    text = _git(root, 'status', '--porcelain=v2', '--branch', '-z', limit=_MAX_STATUS_BYTES)
    if text is None:
        head = _git(root, 'rev-parse', '--verify', '-q', 'HEAD')
        known = head.decode().strip() if head else None
        return Repository(directory=str(root), commit=known, branch=None, dirty=None)
    entries = text.decode(errors='replace').split('\0')
    heads = dict(e[2:].split(' ', 1) for e in entries if e.startswith('# branch.'))
    commit, branch = heads.get('branch.oid'), heads.get('branch.head')
    # 1: changed, 2: renamed, u: not merged.
    dirty = any(entry[:2] in ('1 ', '2 ', 'u ') for entry in entries)
    known = None if commit == '(initial)' else commit
    return Repository(
        directory=str(root),
        commit=known,
        branch=None if branch == '(detached)' else branch,
        dirty=dirty,
        untracked=tuple(entry[2:] for entry in entries if entry.startswith('? ')),
        diff=_diff(root) if dirty and known else b'',
    )


def trainer_version() -> dict[str, Any]:
    """Returns the version of the trainer, and its commit if it runs from a checkout."""
    about: dict[str, Any] = {'version': _version(), 'commit': None}
    root = _root(_HERE)
    # A virtual environment may be inside one of the user's repositories.
    if root is not None and _is_trainer(root):
        text = _git(root, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
        about['commit'] = text.decode().strip() if text else None
    return about


class Lookout:
    """Looks at the code of a run in a thread."""

    def __init__(self, config: pathlib.Path | None):
        """Starts looking, from the current directory."""
        self._code: Code | None = None
        self._then: Callable[[Code], None] | None = None
        self._lock = threading.Lock()
        self._where = pathlib.Path.cwd(), config
        threading.Thread(target=self._look, name='provenance', daemon=True).start()

    def then(self, act: Callable[[Code], None]) -> None:
        """Calls a function with what was found: now if that is known, else in the thread."""
        with self._lock:
            if self._code is None:
                self._then = act
                return
        with contextlib.suppress(OSError):
            act(self._code)

    def _look(self) -> None:
        try:
            code = look(*self._where)
        except Exception as error:  # Never a reason to end a run.
            code = Code(about={'git': None, 'git_error': repr(error)}, diffs={})
        with self._lock:
            self._code, act = code, self._then
        if act is not None:
            with contextlib.suppress(OSError):
                act(code)


def _root(directory: pathlib.Path) -> pathlib.Path | None:
    text = _git(directory, 'rev-parse', '--show-toplevel')
    return pathlib.Path(os.fsdecode(text.rstrip(b'\n'))) if text else None


def _is_trainer(root: pathlib.Path) -> bool:
    if not _HERE.is_relative_to(root.resolve()):
        return False
    return bool(_git(root, 'ls-files', '--', str(_HERE / '__init__.py')))


def _diff(root: pathlib.Path) -> bytes:
    text = _git(root, 'diff', '--no-ext-diff', '--no-color', 'HEAD', limit=_MAX_DIFF_BYTES)
    return text or b''


def _git(directory: pathlib.Path, *words: str, limit: int = 1 << 16) -> bytes | None:
    """Returns git's output, truncated at `limit` bytes; None if it fails or takes too long."""
    # git's file system monitor would keep our pipe open, and its optional locks could block a
    # commit in another window.
    command = ['git', '--no-optional-locks', '-c', 'core.fsmonitor=false', *words]
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, 'GIT_TERMINAL_PROMPT': '0', 'LC_ALL': 'C'},
        )
    except OSError:
        return None
    timer = threading.Timer(_TIMEOUT_SECS, process.kill)
    timer.daemon = True
    timer.start()
    with process:
        assert process.stdout is not None
        text = process.stdout.read(limit + 1)
        if cut := len(text) > limit:
            process.kill()
    timer.cancel()
    if cut:
        return text[:limit] + f'\n[cut after {limit:,} bytes]\n'.encode()
    return text if process.returncode == 0 else None


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(_DISTRIBUTION)
    project = _HERE.parent / 'pyproject.toml'
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = tomllib.loads(project.read_text())['project']
        return str(found['version']) if found['name'] == _DISTRIBUTION else None
    return None
