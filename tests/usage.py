# SPDX-License-Identifier: Apache-2.0
"""The cost of each test file in CPU time, processes and compiled programs, against budgets.toml.

CPU time, because wall time depends on the other users of the machine; and the two counts, because
they are nearly the same on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import resource
import statistics
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

_BUDGETS = pathlib.Path(__file__).with_name('budgets.toml')
# Where budgets.toml has the sum of the tests that are not slow.
QUICK = 'quick tests'
# The key of what a worker hands to the main process.
_KEY = 'usage'
# CPU time of a file from which on it says something about the machine.
_EXACT_SECS = 5


@dataclasses.dataclass
class Usage:
    """The resources that a test or a process has used.

    Attributes:
        cpu_secs: of the process, and of child processes that it has waited for.
        processes: number of processes started by `subprocess`, except git: how often a run asks
            git about its code depends on whether the tests are in a repository.
        programs: number of programs that JAX compiled or read from the compile cache.
    """

    cpu_secs: float = 0.0
    processes: int = 0
    programs: int = 0

    def add(self, other: Usage, sign: int = 1) -> None:
        """Adds the usage of other tests."""
        self.cpu_secs += sign * other.cpu_secs
        self.processes += sign * other.processes
        self.programs += sign * other.programs


_process = Usage()
_files: dict[str, Usage] = collections.defaultdict(Usage)
_over: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --budgets."""
    parser.addoption(
        '--budgets',
        choices=['check', 'write'],
        help='after a run of all tests: fail where a file cost more than tests/budgets.toml '
        'allows, or write what each did cost there',
    )


def pytest_configure() -> None:
    """Starts counting."""
    sys.addaudithook(_count_process)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Makes workers start with the most expensive files, so that none ends the run alone."""
    if hasattr(config, 'workerinput'):
        costs = {name: budget['cpu_secs'] for name, budget in budgets()['files'].items()}
        items.sort(key=lambda item: -costs.get(_file(item), 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Adds the usage of a test, with its fixtures, to that of its file."""
    before = usage_so_far()
    try:
        return (yield)
    finally:
        after = usage_so_far()
        for name in _names(item):
            _files[name].add(after)
            _files[name].add(before, -1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds the usage of a worker."""
    found = getattr(node, 'workeroutput', {}).get(_KEY, '{}')
    for name, usage in json.loads(found).items():
        _files[name].add(Usage(**usage))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Passes a worker's usage to the main process, which compares it with the budgets."""
    if hasattr(session.config, 'workeroutput'):
        found = {name: dataclasses.asdict(usage) for name, usage in _files.items()}
        session.config.workeroutput[_KEY] = json.dumps(found)
        return
    chosen = session.config.getoption('budgets')
    if chosen == 'write':
        _BUDGETS.write_text(format_budgets(_files, _BUDGETS.read_text()))
    elif chosen == 'check':
        _over.extend(excess(_files, budgets()))
        if _over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the files that exceed their budgets."""
    if _over:
        terminalreporter.section('over budget: see tests/budgets.toml', red=True)
        for line in _over:
            terminalreporter.line(line)


def budgets() -> dict[str, Any]:
    """Returns budgets.toml."""
    return tomllib.loads(_BUDGETS.read_text())


def slowdown(files: dict[str, Usage], budgets: dict[str, Any]) -> float:
    """Returns how many times slower most files are than when budgets.toml was written, at least 1.

    Args:
        files: the usage of each file.
        budgets: as for `excess`. Files that take only a few seconds are too inexact to count.
    """
    ratios = [
        files[name].cpu_secs / budget['cpu_secs']
        for name, budget in budgets['files'].items()
        if name in files and name != QUICK and budget['cpu_secs'] >= _EXACT_SECS
    ]
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def excess(files: dict[str, Usage], budgets: dict[str, Any]) -> list[str]:
    """Returns a line for each number that exceeds its limit.

    Args:
        files: the usage of each file.
        budgets: what they had used when budgets.toml was written, the factors that limit it, and
            how much slower the machine may be.
    """
    slower = slowdown(files, budgets)
    most = budgets['slowest_machine']
    lines = []
    if slower > most:
        lines.append(f'most files: {slower:.1f} times their cpu_secs, of at most {most}')
    for name, usage in sorted(files.items()):
        budget = budgets['files'].get(name, budgets['other'])
        for kind, factor in budgets['limits'].items():
            found, limit = getattr(usage, kind), budget[kind] * factor
            if kind == 'cpu_secs':
                limit *= min(slower, most)
            if found > limit:
                lines.append(f'{name}: {kind} {found:.0f}, of at most {limit:.0f}')
    return lines


def format_budgets(files: dict[str, Usage], text: str) -> str:
    """Returns the text of budgets.toml with other files in it: those above what all others may use.

    Args:
        files: the usage of each file.
        text: of budgets.toml.
    """
    head, other = text.split('[files]\n')[0], tomllib.loads(text)['other']
    lines = ['[files]']
    for name, usage in sorted(files.items(), key=lambda item: -item[1].cpu_secs):
        numbers = {kind: math.ceil(x) for kind, x in dataclasses.asdict(usage).items()}
        if any(numbers[kind] > other[kind] for kind in numbers):
            values = ', '.join(f'{kind} = {x}' for kind, x in numbers.items())
            lines.append(f'"{name}" = {{ {values} }}')
    return head + '\n'.join(lines) + '\n'


def _file(item: pytest.Item) -> str:
    return item.nodeid.split('::')[0]


def _names(item: pytest.Item) -> Iterator[str]:
    """Yields the names under which the usage of a test counts."""
    yield _file(item)
    if item.get_closest_marker('slow') is None:
        yield QUICK


def usage_so_far() -> Usage:
    """Returns the usage of this process so far."""
    _listen()
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    secs = sum(part.ru_utime + part.ru_stime for part in parts)
    return Usage(secs, _process.processes, _process.programs)


def _count_process(event: str, args: Any) -> None:
    if event != 'subprocess.Popen':
        return
    command = args[1]
    name = command if isinstance(command, (str, bytes)) else command[0]
    _process.processes += os.path.basename(os.fsdecode(name)) != 'git'


@functools.cache
def _listen() -> None:
    # Not where pytest starts: JAX reads its settings from the environment when it is imported.
    import jax

    jax.monitoring.register_event_duration_secs_listener(_count_program)


def _count_program(event: str, *_: Any, **__: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
        _process.programs += 1
