# SPDX-License-Identifier: Apache-2.0
"""What each test file costs: CPU time, processes and compiled programs, held to budgets.toml.

CPU time, because the time on a clock is that of the machine's other users too; and the two counts,
because they are nearly the same on every machine.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import pathlib
import resource
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


@dataclasses.dataclass
class Usage:
    """What something has used.

    Attributes:
        cpu_secs: of the process, and of children that it has waited for.
        processes: those that `subprocess` has started.
        programs: those that JAX asked its compiler, or the compile cache, for.
    """

    cpu_secs: float = 0.0
    processes: int = 0
    programs: int = 0

    def add(self, other: Usage, sign: int = 1) -> None:
        """Adds what other tests have used."""
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
    """Begins to count."""
    sys.addaudithook(_count_process)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has workers begin with the files that cost most, so that none is left alone with one."""
    if hasattr(config, 'workerinput'):
        costs = {name: budget['cpu_secs'] for name, budget in budgets()['files'].items()}
        items.sort(key=lambda item: -costs.get(_file(item), 0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Adds what a test uses, with its fixtures, to the usage of its file."""
    before = used()
    try:
        return (yield)
    finally:
        after = used()
        for name in _names(item):
            _files[name].add(after)
            _files[name].add(before, -1)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what a worker has used."""
    found = getattr(node, 'workeroutput', {}).get(_KEY, '{}')
    for name, usage in json.loads(found).items():
        _files[name].add(Usage(**usage))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands a worker's usage to the main process, which compares it with the budgets."""
    if hasattr(session.config, 'workeroutput'):
        found = {name: dataclasses.asdict(usage) for name, usage in _files.items()}
        session.config.workeroutput[_KEY] = json.dumps(found)
        return
    chosen = session.config.getoption('budgets')
    if chosen == 'write':
        _BUDGETS.write_text(written(_files, _BUDGETS.read_text()))
    elif chosen == 'check':
        _over.extend(excess(_files, budgets()))
        if _over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says which files are over their budgets."""
    if _over:
        terminalreporter.section('over budget: see tests/budgets.toml', red=True)
        for line in _over:
            terminalreporter.line(line)


def budgets() -> dict[str, Any]:
    """Returns budgets.toml."""
    return tomllib.loads(_BUDGETS.read_text())


def excess(files: dict[str, Usage], budgets: dict[str, Any]) -> list[str]:
    """Returns a line for each number that is over its limit.

    Args:
        files: what each file has used.
        budgets: what they had used when budgets.toml was written, and the factors that limit it.
    """
    lines = []
    for name, usage in sorted(files.items()):
        budget = budgets['files'].get(name, budgets['other'])
        for kind, factor in budgets['limits'].items():
            found, limit = getattr(usage, kind), budget[kind] * factor
            if found > limit:
                lines.append(f'{name}: {kind} {found:.0f}, of at most {limit:.0f}')
    return lines


def written(files: dict[str, Usage], text: str) -> str:
    """Returns the text of budgets.toml with other files in it: those above what all others may use.

    Args:
        files: what each file has used.
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
    """Yields under which names the usage of a test counts."""
    yield _file(item)
    if item.get_closest_marker('slow') is None:
        yield QUICK


def used() -> Usage:
    """Returns what this process has used so far."""
    _listen()
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    secs = sum(part.ru_utime + part.ru_stime for part in parts)
    return Usage(secs, _process.processes, _process.programs)


def _count_process(event: str, _: Any) -> None:
    if event == 'subprocess.Popen':
        _process.processes += 1


@functools.cache
def _listen() -> None:
    # Not where pytest starts: JAX reads its settings from the environment when it is imported.
    import jax

    jax.monitoring.register_event_duration_secs_listener(_count_program)


def _count_program(event: str, *_: Any, **__: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
        _process.programs += 1
