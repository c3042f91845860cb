# SPDX-License-Identifier: Apache-2.0
"""Each function of data/compat.py against the real library: the failing test names it."""

from __future__ import annotations

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from tests.command import ROOT
from trainer.data import compat
from trainer.data.workers import prefetch_in_workers

# Grain's own reader of its options, in a program that has parsed no flags.
_UNPARSED = """
from absl import flags
import grain.python as grain
from trainer.data import compat

flags.DEFINE_string('of_the_user', 'default', 'A flag.')
data = grain.MapDataset.range(4).to_iter_dataset()
options = grain.MultiprocessingOptions(num_workers=1)
try:
    list(data.mp_prefetch(options))
except flags.UnparsedFlagAccessError:
    print('refused')
compat.mark_grain_flags_parsed()
print(list(data.mp_prefetch(options)))
try:
    flags.FLAGS.of_the_user
except flags.UnparsedFlagAccessError:
    print('still unparsed')
"""


def test_every_function_has_its_test() -> None:
    functions = [
        name
        for name, function in inspect.getmembers(compat, inspect.isfunction)
        if function.__module__ == compat.__name__
    ]
    assert functions
    tests = pathlib.Path(__file__).read_text()
    assert not [name for name in functions if not re.search(rf'compat\.{name}\b', tests)]


@pytest.mark.slow
def test_mark_grain_flags_parsed() -> None:
    done = subprocess.run(
        [sys.executable, '-c', _UNPARSED], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n')[:3] == ['refused', '[0, 1, 2, 3]', 'still unparsed']


class _Deadly:
    """Ends the process that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os._exit(3)


@pytest.mark.slow
def test_worker_death() -> None:
    import grain.python as grain

    dataset = grain.MapDataset.source(_Deadly()).to_iter_dataset()
    with pytest.raises(RuntimeError) as caught:
        next(iter(prefetch_in_workers(dataset, 1, 1)))
    sentence = compat.worker_death_cause(caught.value)
    assert sentence.endswith('exit code 3') and len(sentence) < 100


def test_locate_record(tmp_path: pathlib.Path) -> None:
    import grain.python as grain

    for name, count in (('a', 2), ('b', 3)):
        writer = ArrayRecordWriter(str(tmp_path / name), 'group_size:1')
        for index in range(count):
            writer.write(f'{name}{index}'.encode())
        writer.close()
    records = grain.ArrayRecordDataSource([str(tmp_path / name) for name in 'ab'])
    assert [compat.locate_record(records, i) for i in (0, 1, 2, 4)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 2),
    ]


def test_is_decoded() -> None:
    datasets = pytest.importorskip('datasets', reason="needs the extra 'hf'")
    assert compat.is_decoded(datasets.Image())
    assert not compat.is_decoded(datasets.Image(decode=False))
    assert not compat.is_decoded(datasets.Value('int32'))
    assert not compat.is_decoded(datasets.Json())
