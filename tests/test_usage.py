# SPDX-License-Identifier: Apache-2.0
"""The cost of test files, and its limits."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

from tests import usage
from tests.command import ROOT
from tests.usage import Usage

BUDGETS = """# Why.
[limits]
cpu_secs = 3
processes = 1.5
programs = 1

[other]
cpu_secs = 10
processes = 2
programs = 5

[files]
"tests/test_gone.py" = { cpu_secs = 99, processes = 0, programs = 0 }
"""


def test_expensive_files_have_their_own_budget() -> None:
    files = {
        'tests/test_cheap.py': Usage(9.5, 2, 5),
        'tests/test_a.py': Usage(10.5, 0, 1),
        'tests/test_b.py': Usage(11, 3, 6),
    }
    assert usage.format_budgets(files, BUDGETS) == BUDGETS.split('"')[0] + (
        '"tests/test_b.py" = { cpu_secs = 11, processes = 3, programs = 6 }\n'
        '"tests/test_a.py" = { cpu_secs = 11, processes = 0, programs = 1 }\n'
    )


def test_each_number_has_a_limit() -> None:
    limits = {'cpu_secs': 3, 'processes': 1.5, 'programs': 1}
    other = {'cpu_secs': 10, 'processes': 2, 'programs': 5}
    budgets = {
        'slowest_machine': 1,
        'limits': limits,
        'other': other,
        'files': {'a': {**other, 'cpu_secs': 4, 'programs': 50}},
    }
    files = {'a': Usage(12, 3, 50), 'b': Usage(30, 3, 5)}
    assert usage.excess(files, budgets) == []
    files = {'a': Usage(13, 3, 50), 'b': Usage(1, 4, 6)}
    assert usage.excess(files, budgets) == [
        'a: cpu_secs 13, of at most 12',
        'b: processes 4, of at most 3',
        'b: programs 6, of at most 5',
    ]


@pytest.mark.parametrize(
    ('slower', 'extra', 'lines'),
    [
        (1, 2, []),
        (1, 2.1, ['a: cpu_secs 42, of at most 40']),
        (0.5, 4.2, ['a: cpu_secs 42, of at most 40']),
        (2, 2, []),
        (2, 2.1, ['a: cpu_secs 84, of at most 80']),
        (3.5, 1, ['most files: 3.5 times their cpu_secs, of at most 3']),
    ],
)
def test_cpu_times_are_compared_with_those_of_other_files(
    slower: float, extra: float, lines: list[str]
) -> None:
    """On a slower machine all files take longer; one that takes even longer is still found."""
    numbers = {'cpu_secs': 20, 'processes': 0, 'programs': 0}
    limits = {'cpu_secs': 2, 'processes': 1, 'programs': 1}
    names = ('a', 'b', 'c', 'd', usage.QUICK)
    budgets = {'slowest_machine': 3, 'limits': limits, 'files': dict.fromkeys(names, numbers)}
    budgets['other'] = numbers
    files = {name: Usage(20 * slower) for name in 'abcd'}
    files['a'] = Usage(20 * slower * extra)
    files[usage.QUICK] = Usage(1)  # A sum of parts of files, so it says nothing of the machine.
    assert usage.excess(files, budgets) == lines


def test_each_file_with_a_budget_exists() -> None:
    assert len(usage.budgets()['files']) > 20  # An empty table would hold nothing.
    for name in usage.budgets()['files'].keys() - {usage.QUICK}:
        assert (ROOT / name).is_file(), f'{name} is gone: take it out of tests/budgets.toml'


def test_processes_and_programs_are_counted() -> None:
    """JAX does not document its event names: after a rename nothing would be counted."""
    before = usage.usage_so_far()
    subprocess.run([sys.executable, '-c', 'sum(range(10**7))'], check=True)
    subprocess.run(['git', '--version'], check=True, capture_output=True)  # Not counted.
    between = usage.usage_so_far()
    jax.jit(lambda x: x + 41)(1)
    after = usage.usage_so_far()
    assert between.processes - before.processes == 1
    assert between.cpu_secs - before.cpu_secs > 0.05
    assert after.programs - between.programs == 1
