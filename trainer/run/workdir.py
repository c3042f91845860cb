# SPDX-License-Identifier: Apache-2.0
"""The run's directory: its config, what started it, how it ended, and whether it may go on."""

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
from collections.abc import Mapping
from typing import Any, cast

import jax
from etils import epath

from trainer.config import diff, files, identity, json_text, places
from trainer.config.errors import UserError
from trainer.run.provenance import Code

_log = logging.getLogger('trainer')
# A file whose presence says that a checkpoint was committed.
_SAVED = '.saved'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'ml_collections', 'numpy')
# The fields of each start in `run.json`, and the maximum number of starts.
_START_FIELDS = ('status', 'from_step', 'step', 'start', 'end', 'command', 'host', 'pid')
_MAX_STARTS = 100
_DIFFS = ('code.diff', 'config.diff')

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]


class Workdir:
    """Files of one run: `config.json`, `run.json`, `metrics.jsonl`, `checkpoints/`, `result.json`.

    Attributes:
        path: the directory; made by `begin`.
    """

    def __init__(self, path: epath.PathLike):
        """Names the directory; nothing is read or written yet."""
        self.path = epath.Path(places.expand(path, 'workdir'))
        self._claim: Any = None
        self._run: dict[str, Any] | None = None
        self._starts: list[dict[str, Any]] = []
        # The thread that records the code writes run.json too.
        self._lock = threading.Lock()
        self._start: str | None = None

    def claim(self) -> None:
        """Keeps every other run out of the directory until `release`, or the end of this process.

        Where the file system knows no locks (object stores), nothing keeps them out.

        Raises:
            UserError: naming the run that is there.
        """
        if fcntl is None or self._claim is not None or '://' in str(self.path):
            return
        self.make()
        file = open(self.path / '.lock', 'a+', errors='replace')  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or 'unknown'
            file.close()
            raise UserError(
                f'another run is training in {self.path} ({holder}). Wait for its end, or name '
                'another --workdir.'
            ) from None
        except OSError:
            file.close()
            return
        file.truncate(0)
        file.write(f'process {os.getpid()} on {platform.node()}\n')
        file.flush()
        self._claim = file

    def release(self) -> None:
        """Lets other runs in again."""
        with self._lock:
            self._run = None
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.close()

    @property
    def checkpoints(self) -> epath.Path:
        """Where the checkpoints are."""
        return self.path / 'checkpoints'

    def make(self) -> None:
        """Makes the directory; several processes may do so at the same time.

        Raises:
            UserError: if nothing can be written there.
        """
        probe = self.path / f'.writable.{platform.node()}.{os.getpid()}'
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text('')
            probe.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f'nothing can be written to the work directory {self.path}: {reason}. Name another '
                'with --workdir.'
            ) from error

    def begin(
        self, config: Any, resolved: Mapping[str, int], run: Mapping[str, Any]
    ) -> list[diff.Change]:
        """Writes the files of a starting run over those of the run that it goes on with.

        Args:
            config: the resolved config, plain.
            resolved: steps of each duration inside the optimizer, by path.
            run: what `run.json` says of this start.

        Returns:
            What changed in the config since the last start.
        """
        changes = self.config_changes(config, resolved)
        self.make()
        self._start = secrets.token_hex(8)
        self._write('config.json', {'config': diff.to_jsonable(config), 'resolved': resolved})
        self._starts = self._earlier_starts()
        with self._lock:
            began = {'status': 'running', 'step': None, 'start': now(), 'end': None}
            self._run = {**began, **run, 'id': self._start}
            self._write_run()
        return changes

    def update_run(self, **fields: Any) -> None:
        """Changes fields of `run.json`, from `begin` until `release`."""
        with self._lock:
            if self._run is not None:
                self._run.update(fields)
                self._write_run()

    def end_run(self, status: str, step: int) -> None:
        """Writes to `run.json` how a run has ended."""
        self.update_run(status=status, step=step, end=now())

    def keep_code(self, code: Code) -> None:
        """Records the code of a run: in `run.json`, with diffs in separate files."""
        with self._lock:
            if self._run is None:  # The run has ended before git has answered.
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
        """Whether the directory exists, and no run has begun in it."""
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
            return True  # It exists, but cannot be read now.
        return isinstance(run, dict) and run.get('id') == self._start

    def forget_failure(self) -> None:
        """Removes the result of an earlier start that has failed: this one's may be another."""
        with contextlib.suppress(OSError, UserError):
            if (self.result() or {}).get('status') in ('failed', 'diverged'):
                (self.path / 'result.json').unlink()

    def mark_saved(self) -> None:
        """Notes that a checkpoint was committed here; a start without one is then an error."""
        with contextlib.suppress(OSError):
            (self.path / _SAVED).write_text('')

    def unmark_saved(self) -> None:
        """Removes that note: a run starts from scratch."""
        (self.path / _SAVED).unlink(missing_ok=True)

    def check_not_lost(self) -> None:
        """Refuses to start from scratch in the directory of a run that has saved.

        A run that was killed before its first save has metrics too, and may start again.

        Raises:
            UserError: if there are metrics and a checkpoint was committed, but none is left.
        """
        metrics = self.path / 'metrics.jsonl'
        result = self.result() or {}
        # A copy of the directory may be without the marker, and an older run has none.
        was_saved = (self.path / _SAVED).exists() or result.get('digest') is not None
        if was_saved and metrics.exists():
            raise UserError(
                f'{self.path} has the metrics of a run that saved checkpoints, but there are none '
                f'in {self.checkpoints}. Restore them, use another --workdir, or delete {metrics} '
                'to start from scratch.'
            )

    def config_changes(self, config: Any, resolved: Mapping[str, int]) -> list[diff.Change]:
        """Returns the differences to the config that this directory holds, if it holds one."""
        old = self._config()
        if old is None:
            return []
        changes = diff.diff(old['config'], config)
        # A schedule that ends with the run changes when the run gets longer, by no edit of its own.
        changes += [
            diff.Change(f'{path} (in steps)', before, resolved[path])
            for path, before in old['resolved'].items()
            if path in resolved and resolved[path] != before
        ]
        return changes

    def check_same_run(self, config: Any, resolved: Mapping[str, int]) -> None:
        """Refuses to go on with a run under a config that would make it another run.

        Raises:
            UserError: naming the changes.
        """
        changes = identity.identity_changes(self.config_changes(config, resolved))
        if changes:
            raise UserError(
                f'{self.path} holds a run of another config:\n{diff.format_diff(changes)}\n'
                'Name another --workdir, or pass --allow_config_change to go on with this one.'
            )

    def result(self) -> dict[str, Any] | None:
        """Returns `result.json`, or None if no run has ended here; a null metric is a NaN.

        A damaged one counts as none, with a warning: the run writes it again when it ends.
        """
        path = self.path / 'result.json'
        if not path.exists():
            return None
        try:
            found = json_text.parse(path.read_bytes())
            if problem := _problem_of_result(found):
                raise ValueError(problem)
        except (OSError, ValueError) as error:
            _log.warning('%s is damaged and ignored (%s)', path, error)
            return None
        values = found['metrics'].items()
        found['metrics'] = {name: math.nan if v is None else v for name, v in values}
        return cast(dict[str, Any], found)

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

        A metric that is not finite becomes null: JSON cannot represent it.

        Args:
            status: see `trainer.run.result.Result`; 'failed' and 'diverged' too.
            step: the last one that the run has reached.
            digest: of the state at that step; None if it was not saved.
            data_digest: of the batches up to that step; None if it is not known.
            metrics: the newest value of each, by flat name.
            error: what ended the run; see `trainer.run.failure.describe`.
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
                raise ValueError(f'it is {json_text.name(old)}, not an object')
            starts = old.get('starts', [])
            if not isinstance(starts, list) or not all(isinstance(each, dict) for each in starts):
                raise ValueError("'starts' is not a list of objects")
        except (OSError, ValueError) as error:
            _log.warning('%s is damaged: its list of earlier starts is lost (%s)', path, error)
            return []
        for each in starts:
            if each.get('status') == 'running':  # It was killed before it could record its end.
                each['status'] = 'failed'
        return starts[-_MAX_STARTS + 1 :]

    def _write_run(self) -> None:
        run = self._run or {}
        this = {name: run[name] for name in _START_FIELDS if name in run}
        self._write('run.json', {**run, 'starts': [*self._starts, this]})

    def _config(self) -> dict[str, Any] | None:
        """Returns `config.json`, the config in it restored; None if there is none."""
        path = self.path / 'config.json'
        if not path.exists():
            return None
        try:
            found = json_text.parse(path.read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f'it is {json_text.name(found)}')
            for key in ('config', 'resolved'):
                if not isinstance(found.get(key), dict):
                    raise ValueError(f'{key!r} is {json_text.name(found.get(key))}')
            return {**found, 'config': diff.from_jsonable(found['config'])}
        except (OSError, ValueError) as error:
            raise UserError(
                f'{path} is damaged: {error}. Expected an object with the objects "config" and '
                '"resolved", as a start of a run writes it. Restore it, or delete it: the config '
                'of this run is then not compared with that of its last start.'
            ) from error

    def _write(self, name: str, value: Any) -> None:
        try:
            files.replace(self.path / name, json.dumps(value, indent=2) + '\n')
        except IsADirectoryError as error:
            raise UserError(
                f'{self.path / name} is a directory, where the run writes a file: move or delete it'
            ) from error


def _problem_of_result(found: Any) -> str | None:
    """Returns what is wrong with the value of `result.json`, or None."""
    if not isinstance(found, dict):
        return f'it is {json_text.name(found)}, not an object'
    metrics = found.get('metrics')
    values = metrics.values() if isinstance(metrics, dict) else ['']
    is_right = {
        'status': isinstance(found.get('status'), str),
        'step': json_text.is_int(found.get('step')),
        'metrics': all(v is None or json_text.is_number(v) for v in values),
    }
    return next((f'{key!r} is wrong' for key, right in is_right.items() if not right), None)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
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


def now() -> str:
    """Returns the time as written to files: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
