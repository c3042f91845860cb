# SPDX-License-Identifier: Apache-2.0
"""Runs the command line in its own process, as a user does."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MLP = '--config=configs/mnist_mlp.py'
# How the names of values end that depend on the clock.
CLOCK = ('_per_sec', '_wait_secs')
# Small enough that a run takes a second or two.
SMALL = ('--config.data.source.limit=4000', '--config.evals.test.data.source.limit=1000')


@dataclasses.dataclass(frozen=True)
class Finished:
    """The exit code and output of a process."""

    code: int
    out: str
    err: str
    secs: float


def xla_flags(devices: int = 1) -> str:
    """Returns the XLA flags of these tests, for a process with a number of virtual devices."""
    count = '--xla_force_host_platform_device_count='
    others = [
        flag for flag in os.environ.get('XLA_FLAGS', '').split() if not flag.startswith(count)
    ]
    return ' '.join([*others, f'{count}{devices}'])


def environment(python: str = sys.executable, devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process; another Python has the package installed."""
    variables = {**os.environ, 'XLA_FLAGS': xla_flags(devices), 'PYTHONPATH': str(ROOT)}
    if python != sys.executable:
        del variables['PYTHONPATH']
    return variables


def start(
    *args: str,
    cwd: pathlib.Path = ROOT,
    devices: int = 1,
    group: bool = False,
    python: str = sys.executable,
    site: pathlib.Path | None = None,
) -> subprocess.Popen[str]:
    """Starts `python -m trainer.main` on virtual devices, optionally in its own process group.

    Python first imports the sitecustomize.py of the directory `site`, if it is given.
    """
    variables = environment(python, devices)
    if site is not None:
        variables['PYTHONPATH'] = os.pathsep.join([str(site), variables['PYTHONPATH']])
    return subprocess.Popen(
        [python, '-m', 'trainer.main', *args],
        cwd=cwd,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def run(
    *args: str, cwd: pathlib.Path = ROOT, devices: int = 1, python: str = sys.executable
) -> Finished:
    """Runs the command to its end."""
    began = time.monotonic()
    process = start(*args, cwd=cwd, devices=devices, python=python)
    [(out, err)] = ends(process)
    return Finished(process.returncode, out, err, time.monotonic() - began)


def ends(*running: subprocess.Popen[str], secs: float = 300) -> list[tuple[str, str]]:
    """Returns the output of processes after all have ended; one that hangs dumps its stacks."""
    deadline = time.monotonic() + secs
    try:
        return [p.communicate(timeout=max(0, deadline - time.monotonic())) for p in running]
    except subprocess.TimeoutExpired:
        for process in running:
            process.send_signal(signal.SIGUSR2)
        time.sleep(5)  # A launcher passes it on.
        for process in running:
            process.kill()
        told = [process.communicate(timeout=60) for process in running]
        raise AssertionError(f'not ended after {secs} s: {told}') from None
    finally:
        for process in running:
            process.kill()


def train(workdir: pathlib.Path, *args: str, devices: int = 1) -> Finished:
    """Trains the small MLP in a directory; it must succeed."""
    finished = run(MLP, *SMALL, f'--workdir={workdir}', *args, devices=devices)
    assert finished.code == 0, finished.err
    return finished


def result(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns result.json."""
    return json.loads((workdir / 'result.json').read_text())


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the metric rows without values that depend on the clock."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in parsed]


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Checks that two runs ended in the same state, after the same data, with the same rows."""
    for digest in ('digest', 'data_digest'):
        assert result(one)[digest] == result(other)[digest]
    assert rows(one) == rows(other)


def copy_until(whole: pathlib.Path, step: int) -> pathlib.Path:
    """Returns a copy of a run as it would be if it had been killed after the save of a step.

    To resume it costs one start less than to interrupt a second run.
    """
    copy = whole.with_name(f'killed after step {step}')
    shutil.copytree(whole, copy)
    later = [path for path in (copy / 'checkpoints').iterdir() if int(path.name) > step]
    assert later, f'{whole} has no checkpoint after step {step}'
    for path in later:
        shutil.rmtree(path)
    (copy / 'result.json').unlink()
    return copy


def assert_resumes(fit: Callable[[pathlib.Path], Any], whole: pathlib.Path, step: int) -> Any:
    """Checks that a run that is killed after the save of a step equals one that is not.

    Args:
        fit: starts or continues the run of a work directory, and returns its result.
        whole: work directory of the run that is not killed.
        step: one whose checkpoint is kept, before the last one.

    Returns:
        The result of the run that is not killed.
    """
    result_of_whole = fit(whole)
    resumed = copy_until(whole, step)
    fit(resumed)
    assert_same_run(resumed, whole)
    return result_of_whole


def wait_for(condition: Callable[[], bool], secs: float = 60) -> None:
    """Returns when the condition holds; fails if it does not in time."""
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.01)


def rows_written(workdir: pathlib.Path, at_least: int) -> Callable[[], bool]:
    """Returns the condition that metrics.jsonl has this many rows."""

    def enough() -> bool:
        path = workdir / 'metrics.jsonl'
        return path.exists() and path.read_text().count('\n') >= at_least

    return enough
