# SPDX-License-Identifier: Apache-2.0
"""The work directory of a run: its config, starts, result, and checks before resuming."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import jax
from etils import epath

from trainer.checkpoint.errors import SaveError
from trainer.config import diff, files, identity, json_text, places
from trainer.config.errors import UserError
from trainer.run.provenance import Code

_log = logging.getLogger('trainer')
# Exists if a checkpoint was ever committed.
_SAVED = '.saved'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections', 'numpy')
# The fields of each start in `run.json`, and the maximum number of starts.
_START_FIELDS = ('status', 'from_step', 'step', 'start', 'end', 'command', 'host', 'pid')
_MAX_STARTS = 100
# What the files of a start need before the first checkpoint, about.
_PROBE_BYTES = 2**16
# Waits before a small file is written again, in seconds.
_WAITS = (1.0, 4.0)
_DIFFS = ('code.diff', 'config.diff')

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]


class Workdir:
    """Files of one run: `config.json`, `run.json`, `metrics.jsonl`, `checkpoints/`, `result.json`.

    Attributes:
        path: the directory; created by `begin`.
    """

    def __init__(self, path: epath.PathLike):
        """Reads and writes nothing yet."""
        self.path = epath.Path(places.expand(path, 'workdir'))
        self._claim: Any = None
        self._run: dict[str, Any] | None = None
        self._starts: list[dict[str, Any]] = []
        # Two threads write run.json: the main one, and the one that inspects the code.
        self._lock = threading.Lock()
        self._start: str | None = None

    def claim(self) -> None:
        """Locks the directory against other runs until `release` or the end of this process.

        Does nothing on file systems without locks (object stores).

        Raises:
            UserError: naming the run that holds the lock.
        """
        # A second call from this process would conflict with its own lock: `flock` belongs to the
        # open file, not to the process.
        if fcntl is None or self._claim is not None or '://' in str(self.path):
            return
        self.create()
        # Append mode creates the file without truncating it: its text names the run that holds the
        # lock.
        file = open(self.path / '.lock', 'a+', errors='replace')  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or 'unknown'
            file.close()
            raise UserError(
                f'another run is training in {self.path} ({holder}). Wait until it ends, or use '
                'another --workdir.'
            ) from None
        except OSError:
            file.close()
            return
        # Only with the lock: until then the text is that of the other run.
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}\n')
        file.flush()
        self._claim = file

    def release(self) -> None:
        """Unlocks the directory."""
        with self._lock:
            self._run = None
        # Closing the file unlocks it. The file itself stays: deleting it could leave two runs with
        # locks on different files of the same name.
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.close()

    @property
    def checkpoints(self) -> epath.Path:
        """The directory of the checkpoints."""
        return self.path / 'checkpoints'

    def create(self) -> None:
        """Creates the directory; several processes may do so at the same time.

        Raises:
            UserError: if it is not writable.
        """
        is_new, directory = not self.path.exists(), self.path
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for directory in (self.path, self.checkpoints):
                if directory.is_dir():
                    _check_writable(directory)
        except OSError as error:
            if is_new:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            reason = error.strerror or str(error)
            if directory != self.path:
                raise UserError(
                    f'{directory}, where the checkpoints go, is not writable: {reason}.\n'
                    'Make it writable, or use another --workdir.'
                ) from error
            raise UserError(
                f'the work directory {self.path} is not writable: {reason}. Use another --workdir.'
            ) from error

    def begin(
        self, config: Any, resolved: Mapping[str, int], run: Mapping[str, Any]
    ) -> list[diff.Change]:
        """Writes `config.json` and `run.json` of a start, over those of the previous start.

        Args:
            config: the resolved config, plain.
            resolved: steps of each duration inside the optimizer, by path.
            run: fields of `run.json` for this start.

        Returns:
            The changes in the config since the last start.
        """
        # Before `config.json` is overwritten, which has the config of the last start.
        changes = self.config_changes(config, resolved)
        self.create()
        # Random: process ids and host names repeat in containers.
        self._start = secrets.token_hex(8)
        self._write('config.json', {'config': diff.to_jsonable(config), 'resolved': dict(resolved)})
        # Before `run.json` is overwritten, likewise.
        self._starts = self._earlier_starts()
        with self._lock:
            fields = {'status': 'running', 'step': None, 'start': utc_now(), 'end': None}
            self._run = {**fields, **run, 'id': self._start}
            self._write_run()
        return changes

    def update_run(self, **fields: Any) -> None:
        """Changes fields of `run.json`; does nothing before `begin` and after `release`."""
        with self._lock:
            if self._run is not None:
                self._run.update(fields)
                self._write_run()

    def end_run(self, status: str, step: int) -> None:
        """Writes the final status to `run.json`."""
        self.update_run(status=status, step=step, end=utc_now())

    def keep_code(self, code: Code) -> None:
        """Records the code of a run: in `run.json`, with diffs in separate files."""
        with self._lock:
            if self._run is None:  # The run ended before git answered.
                return
            for name in _DIFFS:
                path = self.path / name
                if name in code.diffs:
                    path.write_bytes(code.diffs[name])
                else:  # Left by an earlier start.
                    path.unlink(missing_ok=True)
            self._run.update(code.about)
            self._write_run()

    def is_fresh(self) -> bool:
        """Whether the directory exists, and no run has started in it."""
        return self.path.exists() and not (self.path / 'config.json').exists()

    def is_this_run(self) -> bool:
        """Whether `run.json` is still the one written by `begin`, if that was called here."""
        if self._start is None:
            return True
        try:
            run = json_text.parse((self.path / 'run.json').read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError):
            return True  # It exists, but cannot be read at the moment.
        return isinstance(run, dict) and run.get('id') == self._start

    def forget_failure(self) -> None:
        """Deletes `result.json` of an earlier start that failed: it does not apply to this one."""
        with contextlib.suppress(OSError, UserError):
            if (self.result() or {}).get('status') in ('failed', 'diverged'):
                (self.path / 'result.json').unlink()

    def mark_saved(self) -> None:
        """Records that a checkpoint was committed; starting without one is then an error."""
        with contextlib.suppress(OSError):
            (self.path / _SAVED).write_text('')

    def unmark_saved(self) -> None:
        """Deletes the record of `mark_saved`, when a run starts from scratch."""
        (self.path / _SAVED).unlink(missing_ok=True)

    def check_not_lost(self) -> None:
        """Checks that a start from scratch does not overwrite a run that saved checkpoints.

        A run that was killed before its first save has metrics too, and may start again.

        Raises:
            UserError: if there are metrics and a checkpoint was committed, but none is left.
        """
        metrics = self.path / 'metrics.jsonl'
        result = self.result() or {}
        # Copies of the directory may lack the hidden marker, and runs of old versions have none.
        was_saved = (self.path / _SAVED).exists() or result.get('digest') is not None
        if was_saved and metrics.exists():
            raise UserError(
                f'{self.path} has the metrics of a run that saved checkpoints, but there are none '
                f'in {self.checkpoints}. Restore them, use another --workdir, or delete {metrics} '
                'to start from scratch.'
            )

    def config_changes(self, config: Any, resolved: Mapping[str, int]) -> list[diff.Change]:
        """Returns the changes from the directory's config, if it has one, to this config."""
        old = self._config()
        if old is None:
            return []
        changes = diff.diff(old['config'], config)
        # The steps of a schedule that ends with the run change if the run gets longer, although
        # its own keys do not.
        changes += [
            diff.Change(f'{path} (in steps)', before, resolved[path])
            for path, before in old['resolved'].items()
            if path in resolved and resolved[path] != before
        ]
        return changes

    def check_same_run(self, config: Any, resolved: Mapping[str, int]) -> None:
        """Checks that no change of the config makes this another run.

        Raises:
            UserError: naming the changes.
        """
        changes = identity.identity_changes(self.config_changes(config, resolved))
        if changes:
            raise UserError(
                f'{self.path} has a run with another config:\n{diff.format_diff(changes)}\n'
                'Use another --workdir, or pass --allow_config_change to resume this run.'
            )

    def result(self) -> dict[str, Any] | None:
        """Returns `result.json`, or None if no run has ended here; null metrics become NaN.

        A damaged file is ignored with a warning: the run rewrites it when it ends.
        """
        path = self.path / 'result.json'
        if not path.exists():
            return None
        try:
            result = json_text.parse(path.read_bytes())
            if problem := _problem_of_result(result):
                raise ValueError(problem)
        except (OSError, ValueError) as error:
            _log.warning('%s is damaged and ignored (%s)', path, error)
            return None
        # The inverse of `write_result`: JSON has no NaN.
        values = result['metrics'].items()
        result['metrics'] = {name: math.nan if v is None else v for name, v in values}
        return cast(dict[str, Any], result)

    def write_result(
        self,
        status: str,
        step: int,
        digest: str | None,
        data_digest: str | None,
        metrics: Mapping[str, float],
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes `result.json`: how the run ended, and digests of its state and of its data.

        Metrics that are not finite become null: JSON cannot represent them.

        Args:
            status: see `trainer.run.result.Result`; also 'failed' and 'diverged'.
            step: the last step that the run has reached.
            digest: digest of the state at that step; None if it was not saved.
            data_digest: digest of the batches up to that step; None if it is unknown.
            metrics: the newest value of each metric, by flat name.
            error: what ended the run, from `trainer.run.failure.describe`.
        """
        result: dict[str, Any] = {
            'status': status,
            'step': step,
            'digest': digest,
            'data_digest': data_digest,
            'metrics': {name: v if math.isfinite(v) else None for name, v in metrics.items()},
        }
        if error is not None:
            result['error'] = dict(error)
        self._write('result.json', result)

    def _earlier_starts(self) -> list[dict[str, Any]]:
        path = self.path / 'run.json'
        try:
            old = json_text.parse(path.read_bytes()) if path.exists() else {}
            if not isinstance(old, dict):
                raise ValueError(f'it is {json_text.type_name(old)}, not an object')
            starts = old.get('starts', [])
            if not isinstance(starts, list) or not all(isinstance(each, dict) for each in starts):
                raise ValueError("'starts' is not a list of objects")
        except (OSError, ValueError) as error:
            _log.warning('%s is damaged: its list of earlier starts is lost (%s)', path, error)
            return []
        for each in starts:
            if each.get('status') == 'running':  # Killed before it could record its end.
                each['status'] = 'failed'
        # One less, for the start that is added.
        return starts[-_MAX_STARTS + 1 :]

    def _write_run(self) -> None:
        run = self._run or {}
        this = {name: run[name] for name in _START_FIELDS if name in run}
        self._write('run.json', {**run, 'starts': [*self._starts, this]})

    def _config(self) -> dict[str, Any] | None:
        """Returns `config.json` with the config parsed; None if there is no such file."""
        path = self.path / 'config.json'
        if not path.exists():
            return None
        try:
            content = json_text.parse(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f'it is {json_text.type_name(content)}')
            for key in ('config', 'resolved'):
                if not isinstance(content.get(key), dict):
                    raise ValueError(f'{key!r} is {json_text.type_name(content.get(key))}')
            # Tuples and other values that JSON lacks come back, or every start would see them as
            # changed.
            return {**content, 'config': diff.from_jsonable(content['config'])}
        except (OSError, ValueError) as error:
            raise UserError(
                f'{path} is damaged: {error}. Expected an object with the objects "config" and '
                '"resolved", as written when a run starts. Restore it, or delete it: then the '
                'config of this run is not compared with that of its last start.'
            ) from error

    def _write(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2) + '\n'
        for wait in (*_WAITS, None):
            try:
                files.replace(self.path / name, text)
                return
            except IsADirectoryError as error:
                raise UserError(
                    f'{self.path / name} is a directory, but the run writes a file there: move or '
                    'delete it'
                ) from error
            except OSError as error:
                if wait is None:
                    raise SaveError(
                        f'{self.path / name} cannot be written: {error.strerror or error}. Fix '
                        'the cause; the same command continues.',
                        is_temporary=False,
                    ) from error
                time.sleep(wait)


def _check_writable(directory: epath.Path) -> None:
    """Writes and deletes a file, and raises an OSError if that fails."""
    # Permissions do not show whether a write works: a file system may be full, read-only or remote.
    # The name is unique, because all processes probe at the same time.
    probe = directory / f'.writable.{platform.node()}.{os.getpid()}'
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _problem_of_result(result: Any) -> str | None:
    """Returns what is wrong with the content of `result.json`, or None."""
    if not isinstance(result, dict):
        return f'it is {json_text.type_name(result)}, not an object'
    metrics = result.get('metrics')
    # The empty text fails the check below, as a missing dict should.
    values = metrics.values() if isinstance(metrics, dict) else ['']
    is_valid = {
        'status': isinstance(result.get('status'), str),
        'step': json_text.is_int(result.get('step')),
        'metrics': all(v is None or json_text.is_number(v) for v in values),
    }
    return next((f'{key!r} is invalid' for key, valid in is_valid.items() if not valid), None)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    return {
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def describe_run(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns the `run.json` fields of a start: command, overrides, versions, devices, host."""
    devices = jax.devices()
    return {
        'command': [sys.executable, *sys.argv],
        'overrides': dict(overrides),
        'versions': versions(),
        'devices': {
            'kind': devices[0].device_kind,
            'platform': devices[0].platform,
            'count': len(devices),
            'processes': jax.process_count(),
        },
        'host': platform.node(),
        'pid': os.getpid(),
    }


def utc_now() -> str:
    """Returns the current time as written to files: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
