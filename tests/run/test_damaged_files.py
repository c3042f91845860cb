# SPDX-License-Identifier: Apache-2.0
"""Damaged files of a run and of weights: each gives a message, never a traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.command import ROOT
from trainer import main
from trainer.checkpoint import checked, empty
from trainer.checkpoint.errors import CheckpointError
from trainer.config import json_text
from trainer.config.errors import UserError
from trainer.data.sources import ArraySource
from trainer.data.stream_pipeline import Pipeline
from trainer.data.stream_reader import Reader
from trainer.observe.progress import NullScreen
from trainer.observe.writers import MetricsFile
from trainer.parallel.signals import StopRequest
from trainer.run.batch_sizes import BatchSizes
from trainer.run.reporter import Reporter
from trainer.run.resume import Recovery
from trainer.run.workdir import Workdir
from trainer.step import health
from trainer.trainer import Trainer
from trainer.weights import read as opening
from trainer.weights import safetensors

META = 'checkpoints/50/meta/metadata'
OPTIONS = {
    'early_stopping': {'metric': 'eval/test/loss', 'patience': 100},
    'checkpoint__best__metric': 'eval/test/accuracy',
}

# What a value of JSON may turn into.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2.5, 1e300, 10**400, float('nan'), float('inf'), '', 'x', '\ud800', '50',
    [], {}, [None], [[]], [1, 2], [[0, 64], [0, 8]], [{}], {'': None}, {'a': {'b': [1]}},
    {'__tuple__': 5}, ['float32'], [[['a'], 'float32', [-1, 0]]], [[0] * 4] * 3,
)  # fmt: skip


def _texts(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yields damaged versions of a file of any kind."""
    yield from (b'', b'\n', data[:1], data[: len(data) // 2], data[:-2], data + data, data[::-1])
    yield from (b'null', b'[]', b'[1, 2]', b'3', b'"x"', b'true', b'NaN', b'{}', b'{"a": ')
    yield from (b'[' * 100_000, b'[' * 900 + b']' * 900, b'1' * 5000, b'{"digest": "\\ud800"}')
    yield from (b'\xff\xfe' + data, b'\xef\xbb\xbf' + data, data.decode('latin1').encode('utf-16'))
    for size in (1, 4, 64):
        for _ in range(4):
            place = chance.randrange(max(1, len(data) - size))
            yield data[:place] + chance.randbytes(size) + data[place + size :]
            yield data[:place] + bytes(size) + data[place + size :]
            yield data[:place] + data[place + size :]


def _values(data: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    """Yields damaged versions of a JSON file: each key missing or wrong, also in nested values."""
    whole = json.loads(data)
    for key in whole:
        yield json.dumps({k: v for k, v in whole.items() if k != key}).encode()
        for value in VALUES:
            yield json.dumps({**whole, key: value}).encode()
    for _ in range(count):
        changed = json.loads(data)
        at = changed
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = chance.choice(keys)
            if not isinstance(at[key], dict | list) or not at[key] or chance.random() < 0.2:
                break
            at = at[key]
        if chance.random() < 0.2:
            del at[key]
        else:
            at[key] = chance.choice(VALUES)
        yield json.dumps(changed).encode()


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run."""
    workdir = tmp_path_factory.mktemp('damaged') / 'run'
    trainer = small.trainer_in(workdir, **OPTIONS)
    trainer.fit()
    return trainer


def _path(trainer: Trainer) -> pathlib.Path:
    assert trainer.workdir is not None
    return pathlib.Path(str(trainer.workdir.path))


def _resume(trainer: Trainer, *, with_arrays: bool = True) -> None:
    """Reads the files of a run as a start and the read-only modes do.

    Args:
        trainer: whose run; its programs are compiled only once.
        with_arrays: whether to restore the arrays too, or only to use all of the metadata.
    """
    report = Reporter(50, 64, NullScreen())
    recovery = Recovery(trainer.run, report)
    workdir, checkpoints = Workdir(_path(trainer)), trainer.checkpoints
    assert checkpoints is not None and trainer.workdir is not None
    experiment = trainer.experiment
    workdir.result()
    workdir.forget_failure()
    workdir.is_this_run()
    checkpoints._scores.clear()  # It keeps what it has read.
    checkpoints.best()
    BatchSizes.from_run(workdir, 64)
    for read in (
        lambda: workdir.config_changes(experiment.origin.config, experiment.origin.schedule_steps),
        lambda: opening.locate(workdir.path, 'best'),
        workdir.check_not_lost,
    ):
        with contextlib.suppress(UserError, CheckpointError):
            read()
    recovery.check()
    if with_arrays:
        recovery.start(trainer.set_up().programs)
        # The child that it forks holds the claim of the directory until it has become git.
        for thread in threading.enumerate():
            if thread.name == 'provenance':
                thread.join(60)
    else:
        _use(recovery, report, checkpoints.meta(50, checked.RUN_KEYS))
    try:
        recovery.open(50)
    finally:
        report.close()
        trainer.workdir.release()


def _use(recovery: Recovery, report: Reporter, meta: dict[str, Any]) -> None:
    """Uses the metadata as `Recovery.start` does."""
    empty.from_metadata(meta)
    BatchSizes.from_checkpoint(meta, 64).with_size(50, 64)
    recovery._consumed.restore(50, meta, may_restart=False)
    recovery._fingerprint_data()
    recovery._report_data_changes(50, meta)
    with contextlib.suppress(ValueError):  # Which `with_health` puts into words.
        health.from_metadata(health.Health(jnp.zeros(6, jnp.int32)), meta.get('health'))
    recovery._restore_early_stopping(meta)
    report.restore(50, meta['metrics'], meta['evaluated'])


@contextlib.contextmanager
def _restore_files(directory: pathlib.Path, files: tuple[str, ...]) -> Iterator[None]:
    before = {name: (directory / name).read_bytes() for name in files}
    try:
        yield
    finally:
        for name, data in before.items():
            (directory / name).write_bytes(data)
        (directory / 'metrics.jsonl.damaged').unlink(missing_ok=True)


FILES = ('config.json', 'run.json', 'result.json', 'metrics.jsonl', META)


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_no_damage_ends_in_a_traceback(name: str, run: Trainer) -> None:
    chance, path = random.Random(13), _path(run)
    data = (path / name).read_bytes()
    damages = list(_texts(data, chance))
    if name != 'metrics.jsonl':
        values = list(_values(data, chance, 60))
        damages += chance.sample(values, 150 if name == META else 60)
    outcomes = {'resumed': 0, 'refused': 0}
    for damage in damages:
        with _restore_files(path, FILES):
            (path / name).write_bytes(damage)
            try:
                _resume(run, with_arrays=chance.random() < 0.02)
                outcomes['resumed'] += 1
            except (UserError, CheckpointError) as error:
                assert str(path) in str(error) or 'step 50' in str(error)
                outcomes['refused'] += 1
    harmless = name in ('run.json', 'result.json', 'metrics.jsonl')
    assert (outcomes['refused'] == 0) == harmless
    assert outcomes['resumed'] > 0


@pytest.mark.parametrize('name', FILES)
def test_a_directory_or_dangling_link_in_place_of_a_file(name: str, run: Trainer) -> None:
    path = _path(run)
    with _restore_files(path, FILES):
        for make in (pathlib.Path.mkdir, lambda p: p.symlink_to(path / 'nowhere' / 'x')):
            (path / name).unlink()
            make(path / name)
            with contextlib.suppress(UserError, CheckpointError):
                _resume(run, with_arrays=False)
            if (path / name).is_dir():
                (path / name).rmdir()
            else:
                (path / name).unlink()
            (path / name).write_text('')


def test_a_lock_file_with_damaged_text(tmp_path: pathlib.Path) -> None:
    holder = Workdir(tmp_path)
    holder.claim()
    (tmp_path / '.lock').write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match='another run is training'):
        Workdir(tmp_path).claim()
    holder.release()


def test_a_damaged_checkpoint_is_a_checkpoint_error(
    run: Trainer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / 'run'
    shutil.copytree(_path(run), copy)
    (copy / META).write_text('[1, 2]')
    (copy / 'result.json').unlink()
    command = [f'--config={ROOT}/configs/mnist_mlp.py', f'--workdir={copy}']
    command += [
        f'--config.{key.replace("__", ".")}={value}'
        for key, value in {**small.OPTIONS, **OPTIONS}.items()
    ]
    code = main.main(['x', *command], StopRequest())
    message = capsys.readouterr().err
    assert code == 65, message
    assert 'its metadata is a list, not an object' in message
    assert 'Traceback' not in message


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: m.pop('data_digest'), "lacks 'data_digest'"),
        (lambda m: m.pop('metrics'), "lacks 'metrics'"),
        (lambda m: m.update(metrics=[1]), "'metrics' in its metadata is [1], not an object"),
        (lambda m: m.update(evaluated=3), "'evaluated' in its metadata is 3"),
        (lambda m: m.update(step='50'), "'step' in its metadata is '50'"),
        (lambda m: m.update(step=49), 'is not the checkpoint of step 50'),
        (lambda m: m.update(batch_sizes=[[0, 64], [0, 8]]), "'batch_sizes' in its metadata"),
        (lambda m: m.update(health=[1, 2]), 'expected the shape (4,), got (2,)'),
        (lambda m: m.update(early_stopping={}), "'early_stopping' in its metadata is {}"),
        (lambda m: m.update(data={'examples': 5}), "'data' in its metadata"),
    ],
)
def test_metadata_of_a_wrong_type_is_named(
    change: Callable[[dict[str, Any]], Any], message: str, run: Trainer
) -> None:
    path = _path(run)
    with _restore_files(path, FILES):
        meta = json.loads((path / META).read_text())
        change(meta)
        (path / META).write_text(json.dumps(meta))
        with pytest.raises(CheckpointError) as caught:
            _resume(run)
    assert message in str(caught.value)


def test_metadata_as_written_is_valid(run: Trainer) -> None:
    meta = json.loads((_path(run) / META).read_text())
    assert {'step', 'data', 'early_stopping', 'batch_sizes', *checked.RUN_KEYS} <= meta.keys()
    assert checked.find_problem(meta, checked.RUN_KEYS) is None


def test_damaged_lines_of_metrics_move_to_another_file(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'metrics.jsonl'
    good = [b'{"step": %d,\r "train/loss": 1.0}' % step for step in (10, 20, 30)]
    bad = [b'\x00\xff\xfe\x80', b'{"step": 1', b'[10]', b'{"step": "10"}', b'{"loss": 1}', b'7']
    path.write_bytes(b'\n'.join([good[0], *bad, good[1], b'', good[2], b'{"step": 40']))
    with caplog.at_level(logging.WARNING, logger='trainer'):
        file = MetricsFile(path, resume_step=20)
    file.write(30, {'train/loss': 2.0})
    file.close()
    rows = [json.loads(line) for line in path.read_bytes().split(b'\n')[:-1]]
    assert [(row['step'], row['train/loss']) for row in rows] == [(10, 1), (20, 1), (30, 2)]
    aside = tmp_path / 'metrics.jsonl.damaged'
    assert aside.read_bytes() == b'\n'.join(bad) + b'\n'
    message = [f'{path} is damaged: moved 6 lines (2, 3, 4, 5, 6, ...) to {aside}']
    assert [record.getMessage() for record in caplog.records] == message
    path.write_bytes(path.read_bytes() + b'null\n')
    MetricsFile(path, resume_step=20).close()
    assert aside.read_bytes().endswith(b'null\n')


def test_a_damaged_result_is_ignored_with_a_warning(
    run: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    path = _path(run)
    with _restore_files(path, FILES):
        (path / 'result.json').write_text('{"status": "finished"}')
        with caplog.at_level(logging.WARNING, logger='trainer'):
            assert Workdir(path).result() is None
    assert "result.json is damaged and ignored ('step' is invalid)" in caplog.text


def test_the_error_for_a_damaged_config_says_what_deleting_it_costs(run: Trainer) -> None:
    path = _path(run)
    with _restore_files(path, FILES):
        (path / 'config.json').write_text('[]')
        with pytest.raises(UserError) as caught:
            run.check_workdir()
        assert 'config.json is damaged: it is a list' in str(caught.value)
        assert 'not compared' in str(caught.value)
        (path / 'config.json').unlink()
        run.check_workdir()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'\xff', "can't decode byte"),
        (b'"\\ud800"', 'surrogates not allowed'),
        (b'[' * 300 + b']' * 300, 'levels of nesting'),
        (b'[' * 100_000, 'levels of nesting'),
    ],
)
def test_unusable_json_is_a_value_error(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_text.parse(text)


def _tensors(directory: pathlib.Path, **entries: Any) -> pathlib.Path:
    """Writes 16 bytes below a header."""
    header = json.dumps(entries).encode()
    path = directory / 'x.safetensors'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(16))
    return path


def _entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = 'F32') -> dict[str, Any]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        ({'a': _entry(0, 8), 'b': _entry(4, 12)}, "'a' and 'b' share bytes"),
        ({'a': _entry(0, 8), 'b': _entry(0, 8)}, "'a' and 'b' share bytes"),
        ({'a': _entry(8, 24, (4,))}, "'a', float32 (4,), has bytes 8 to 24"),
        ({'a': _entry(0, 16)}, "'a', float32 (2,), has bytes 0 to 16"),
        ({'a': _entry(-8, 0)}, "'a' has shape [2] and bytes [-8, 0]"),
        ({'a': _entry(8, 0, [-2])}, "'a' has shape [-2]"),
        ({'a': _entry(0, 8, [[2]])}, "'a' has shape [[2]]"),
        ({'a': _entry(0, 8, [True, 2])}, "'a' has shape [True, 2]"),
        ({'a': _entry(0, 8.0)}, "'a' has shape [2] and bytes [0, 8.0]"),
        ({'a': _entry(0, 0, [0, 10**30])}, 'is not a safetensors file or is damaged'),
        ({'a': _entry(0, 8, dtype='F4')}, "the dtype of 'a' is 'F4'; expected one of"),
        ({'a': _entry(0, 8, dtype=['F32'])}, "the dtype of 'a' is ['F32']"),
        ({'a': {'b': _entry(0, 8)}}, "the header entry of 'a' is {'b'"),
        ({'a': [1]}, "the header entry of 'a' is [1]"),
        ({'a.b': _entry(0, 8), 'a/b': _entry(8, 16)}, "two tensors have the name 'a/b'"),
        ({'a': _entry(0, 8), 'a.b': _entry(8, 16)}, "'a/b' is below 'a', which is a tensor too"),
    ],
)
def test_headers_that_do_not_fit_their_file_are_named(
    entries: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError) as caught:
        opening.open_tree(_tensors(tmp_path, **entries))
    assert message in str(caught.value)
    assert 'x.safetensors' in str(caught.value)


def test_a_header_longer_than_its_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'x.safetensors'
    for length in (2**63, 2**64 - 1, 17):
        path.write_bytes(length.to_bytes(8, 'little') + b'{"a": 1}' + bytes(8))
        with pytest.raises(UserError, match='more than the file'):
            safetensors.read(path)


def refusals(path: pathlib.Path, damages: Sequence[bytes]) -> int:
    """Opens a file of weights with each content; returns the number of refusals, by name."""
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            for leaf in opening.open_tree(path).values():
                assert isinstance(leaf.shape, tuple)
            opening.open_raw(path)
        except UserError as error:
            assert path.name in str(error)
            refused += 1
    return refused


def test_no_damage_to_weights_ends_in_a_traceback(tmp_path: pathlib.Path) -> None:
    chance = random.Random(13)
    path = tmp_path / 'x.safetensors'
    safetensors.write(path, {'a.w': np.ones((2, 3), np.float32), 'a.b': np.ones(3, np.float16)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header, rest = data[8 : 8 + length], data[8 + length :]
    damages = [*_texts(data, chance)]
    damages += [len(x).to_bytes(8, 'little') + x + rest for x in _texts(header, chance)]
    damages += [len(x).to_bytes(8, 'little') + x + rest for x in _values(header, chance, 200)]
    assert 0 < refusals(path, damages) < len(damages)


def test_no_damage_to_msgpack_ends_in_a_traceback(tmp_path: pathlib.Path) -> None:
    chance = random.Random(13)
    path = tmp_path / 'x.msgpack'
    tree = {'a': {'w': np.ones((2, 3), np.float32), 'n': 3}, 'b': [np.ones(3, np.float16)]}
    data = flax.serialization.msgpack_serialize(tree)
    damages = [*_texts(data, chance), b'\x82\x01\x02\xa1a\x03']  # The last is {1: 2, 'a': 3}.
    assert 0 < refusals(path, damages) < len(damages)


def test_the_position_of_a_stream_is_validated() -> None:
    pipeline = Pipeline(source=ArraySource({'x': np.arange(8)}))
    reader = Reader(pipeline)
    reader.next()
    state = json.loads(json.dumps(reader.state()))
    reader.close()
    again = Reader.from_state(state, pipeline)
    example = again.next()
    assert example is not None and example['x'] == 1
    again.close()
    chance, data = random.Random(13), json.dumps(state).encode()
    for damage in _values(data, chance, 100):
        try:
            found = Reader.from_state(json.loads(damage), pipeline)
            found.next()
            found.close()
        except ValueError as error:
            assert 'checkpoint' in str(error)
