# SPDX-License-Identifier: Apache-2.0
"""A worker process that crashes fails the test it ran, with the stacks of its threads."""

from __future__ import annotations

import faulthandler
import os
import pathlib
import tempfile
from typing import Any, TextIO

import pytest
from xdist.scheduler import LoadFileScheduling

_FRAMES = 20
_FILE = pytest.StashKey[TextIO]()


@pytest.hookimpl(trylast=True)  # Before that, pytest has them written to the terminal.
def pytest_configure(config: pytest.Config) -> None:
    """Makes a worker write the stacks of its threads to a file that the main process finds.

    On the terminal they would be far from the name of the test, and end with a line of several
    kilobytes that lists all extension modules.
    """
    if worker := getattr(config, 'workerinput', None):
        config.stash[_FILE] = _path(worker).open('w')
        faulthandler.enable(config.stash[_FILE])


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the file of a worker that did not crash."""
    if file := config.stash.get(_FILE, None):
        faulthandler.disable()
        file.close()
        os.unlink(file.name)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: Any) -> None:
    """Adds the stacks to the failure of the test that the worker was running."""
    path = _path(report.node.workerinput)
    if path.exists():
        # Not in `longrepr`, which pytest repeats in its last lines where the variable CI is set.
        report.sections.append(('stacks', shorten_stacks(path.read_text())))
        path.unlink()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Makes a test that crashed its worker run once, and not again in each new worker."""
    return _Files(config, log) if config.getoption('dist') == 'loadfile' else None


class _Files(LoadFileScheduling):
    def remove_node(self, node: Any) -> str | None:
        for tests in self.assigned_work[node].values():
            for name, is_done in tests.items():
                if not is_done:
                    tests[name] = True
                    super().remove_node(node)  # Gives the rest of the file to another worker.
                    return name
        return super().remove_node(node)

    def _reschedule(self, node: Any) -> None:
        if (
            node in self.registered_collections
        ):  # One in the place of another still looks for tests.
            super()._reschedule(node)


def shorten_stacks(stacks: str) -> str:
    """Returns faulthandler's output: the crashed thread first, without the extension modules."""
    kept = [part for part in stacks.split('\n\n') if not part.startswith('Extension modules')]
    # 'Thread 0x... (most recent call first):', or 'Current thread' for the one that crashed.
    kept.sort(key=lambda part: part.startswith('Thread '))
    return '\n\n'.join(_first_lines(part) for part in kept).strip()


def _first_lines(part: str) -> str:
    lines = part.splitlines()
    more = [f'  ... and {len(lines) - _FRAMES} more'] if len(lines) > _FRAMES else []
    return '\n'.join(lines[:_FRAMES] + more)


def _path(worker: dict[str, Any]) -> pathlib.Path:
    name = f'pytest-crash-{worker["testrunuid"]}-{worker["workerid"]}.txt'
    return pathlib.Path(tempfile.gettempdir()) / name
