# SPDX-License-Identifier: Apache-2.0
"""ArrayRecord files, written and read by the real library."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from trainer.config import targets
from trainer.config.errors import UserError
from trainer.data.array_record import ArrayRecord
from trainer.data.grain_loader import GrainLoader
from trainer.data.loader import TrainLoader


def decode(record: bytes) -> dict[str, Any]:
    """Decodes a record: a number as text, and its square."""
    if record == b'torn':
        raise ValueError('not a number')
    return {'x': np.int32(int(record)), 'y': np.full(3, int(record) ** 2, np.int64)}


def first_byte(record: bytes) -> dict[str, Any]:
    return {'x': np.uint8(record[0])}


def write(path: pathlib.Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def record_files(tmp_path: pathlib.Path) -> pathlib.Path:
    """Three files of 5, 1 and 4 records."""
    numbers = iter(range(10))
    for name, count in (('a', 5), ('b', 1), ('c', 4)):
        records = [str(next(numbers)).encode() for _ in range(count)]
        write(tmp_path / f'{name}.array_record', records)
    return tmp_path


def test_records_are_in_the_order_of_the_files(record_files: pathlib.Path) -> None:
    source = ArrayRecord(str(record_files / '*.array_record'), decode=decode)
    assert len(source) == 10
    read = source.gather(np.array([9, 0, 5, 5]))
    np.testing.assert_array_equal(read['x'], [9, 0, 5, 5])
    np.testing.assert_array_equal(read['y'][:, 0], [81, 0, 25, 25])
    named = ArrayRecord(
        [str(record_files / 'c.array_record'), str(record_files / 'a.array_record')], decode=decode
    )
    np.testing.assert_array_equal(named.gather(np.arange(9))['x'], [6, 7, 8, 9, 0, 1, 2, 3, 4])


@pytest.mark.slow
def test_worker_processes_read_it(record_files: pathlib.Path) -> None:
    source = ArrayRecord(str(record_files / '*.array_record'), decode=decode)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.gather(np.array([7]))['x'], [7])
    loader = GrainLoader(source=source, batch_size=4, seed=3, workers=1)
    try:
        made = loader.block(0, 5)
    finally:
        loader.close()
    expected = TrainLoader(source=source, batch_size=4, seed=3).block(0, 5)
    np.testing.assert_array_equal(made.arrays['x'], expected.arrays['x'])


def test_a_record_that_cannot_be_decoded_is_named(tmp_path: pathlib.Path) -> None:
    write(tmp_path / 'a.array_record', [b'0', b'1'])
    write(tmp_path / 'b.array_record', [b'2', b'torn', b'4'])
    source = ArrayRecord(str(tmp_path / '*.array_record'), decode=decode)
    with pytest.raises(ValueError, match='not a number') as caught:
        TrainLoader(source=source, batch_size=5).block(0, 1)
    notes = '\n'.join(caught.value.__notes__)
    assert f'while reading record 1 of {tmp_path / "b.array_record"}' in notes
    write(tmp_path / 'c.array_record', [b'torn'])
    with pytest.raises(ValueError, match='not a number') as caught:
        ArrayRecord(str(tmp_path / 'c.array_record'), decode=decode)
    assert caught.value.__notes__ == [f'while reading record 0 of {tmp_path / "c.array_record"}']


@pytest.mark.parametrize('damaged', [0, 2])
def test_a_damaged_record_is_named(damaged: int, tmp_path: pathlib.Path) -> None:
    file = tmp_path / 'a.array_record'
    records = [np.random.default_rng(i).bytes(200_000) for i in range(4)]
    write(file, records)
    whole = bytearray(file.read_bytes())
    whole[whole.index(records[damaged][-32:])] ^= 1
    file.write_bytes(whole)
    with pytest.raises((ValueError, RuntimeError), match='hash mismatch') as caught:
        source = ArrayRecord(str(file), decode=first_byte)
        TrainLoader(source=source, batch_size=4).block(0, 1)
    told = [str(caught.value), *getattr(caught.value, '__notes__', ())]
    assert f'while reading record {damaged} of {file}' in '\n'.join(told)
    assert isinstance(caught.value, ValueError) == (damaged == 0)  # In words, at the start.


def test_a_damaged_file_is_named(record_files: pathlib.Path) -> None:
    (record_files / 'b.array_record').write_bytes(b'no such format' * 10_000)
    with pytest.raises(ValueError, match=r'/b\.array_record is not an ArrayRecord file'):
        ArrayRecord(str(record_files / '*.array_record'), decode=decode)


def test_messages_for_mistakes(tmp_path: pathlib.Path) -> None:
    node = {'target': 'trainer.data.array_record:ArrayRecord', 'path': f'{tmp_path}/*.array_record'}
    decoder = {'ref': f'{__name__}:decode'}
    with pytest.raises(UserError, match='no file matches'):
        targets.instantiate({**node, 'decode': decoder}, 'config.data.source')
    write(tmp_path / 'empty.array_record', [])
    with pytest.raises(UserError, match='the source is empty'):
        targets.instantiate({**node, 'decode': decoder}, 'config.data.source')
