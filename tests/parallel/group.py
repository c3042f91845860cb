# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as several real processes of one run."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from tests import command


def free_port() -> int:
    """Returns a free port."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def flags(count: int, port: int, *, timeout_secs: int = 60) -> tuple[str, ...]:
    """Returns the flags that all processes of a run have in common."""
    at = f'--coordinator=127.0.0.1:{port}'
    return (at, f'--num_processes={count}', f'--init_timeout={timeout_secs}')


def start(
    count: int,
    workdir: pathlib.Path,
    *args: str,
    config: Sequence[str] = (command.MLP, *command.SMALL),
    devices: int = 1,
    only: Mapping[int, str] | None = None,
    cwds: Sequence[pathlib.Path] = (),
) -> list[subprocess.Popen[str]]:
    """Starts a run of several processes.

    Args:
        count: how many; a single one gets no flags.
        workdir: of the run.
        *args: for all of them.
        config: the config and what makes it small.
        devices: of each process.
        only: an argument for one of them, by number.
        cwds: where each of them is started, if not in the repository.
    """
    common = (*config, f'--workdir={workdir}', *args)
    if count == 1:
        return [command.start(*common, devices=devices)]
    common_flags = flags(count, free_port())
    extra = {number: [text] for number, text in (only or {}).items()}
    return [
        command.start(
            *common, *common_flags, f'--process_id={i}', *extra.get(i, []),
            devices=devices, cwd=cwds[i] if cwds else command.ROOT,
        )
        for i in range(count)
    ]  # fmt: skip


def finish(running: Sequence[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Returns exit codes, outputs and errors, by process; kills all processes after a failure."""
    ended = command.ends(*running, secs=240)
    return [p.returncode for p in running], [out for out, _ in ended], [err for _, err in ended]


def train(count: int, workdir: pathlib.Path, *args: str, devices: int = 1) -> list[str]:
    """Runs to the end, which must be a success; returns the outputs by process."""
    codes, outputs, errors = finish(start(count, workdir, *args, devices=devices))
    assert codes == [0] * count, errors
    return outputs


@contextlib.contextmanager
def kill_at_exit(running: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Kills all processes at the end of the block."""
    try:
        yield
    finally:
        for process in running:
            process.kill()
