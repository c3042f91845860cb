# SPDX-License-Identifier: Apache-2.0
"""Every kind of column of `datasets`, in small files: read in its own type, or refused by name."""

from __future__ import annotations

import datetime
import decimal
import pathlib
from typing import Any

import numpy as np
import pytest

from trainer.config import targets
from trainer.config.errors import UserError
from trainer.data.grain_loader import GrainLoader
from trainer.data.hf import HuggingFace, HuggingFaceStream
from trainer.data.loader import TrainLoader
from trainer.data.streaming import StreamLoader

datasets = pytest.importorskip('datasets', reason="needs the extra 'hf'")
pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

ROWS = np.array([2, 0])
_DAY = datetime.datetime(2024, 5, 17, 1, 2, 3)
_MIDNIGHT = datetime.timedelta(hours=1, minutes=2, seconds=3)
_NUMBERS = ('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64')
_FLOATS = ('float16', 'float32', 'float64')


def _times(kind: type, unit: str, values: list[Any]) -> np.ndarray:
    return np.array(values, f'{np.dtype(kind).kind}8[{unit}]')


# Of each kind of column three rows, and what rows 2 and 0 are as an array.
KINDS: dict[str, tuple[Any, np.ndarray]] = {
    **{
        name: (pa.array(np.array([1, 2, 3], name)), np.array([3, 1], name))
        for name in (*_NUMBERS, *_FLOATS)
    },
    'missing floats': (pa.array([1.5, 0.0, None]), np.array([np.nan, 1.5])),
    'missing half floats': (
        pa.array([np.float16(1.5), np.float16(0), None], pa.float16()),
        np.array([np.nan, 1.5], np.float16),
    ),
    'bool': (pa.array([True, False, False]), np.array([False, True])),
    'string': (pa.array(['a', 'b', 'ccc']), np.array(['ccc', 'a'])),
    'large_string': (pa.array(['a', 'b', 'ccc'], pa.large_string()), np.array(['ccc', 'a'])),
    'string_view': (pa.array(['a', 'b', 'ccc'], pa.string_view()), np.array(['ccc', 'a'])),
    'category': (pa.array(['a', 'b', 'a']).dictionary_encode(), np.array(['a', 'a'])),
    'binary': (pa.array([b'a\0', b'', b'b']), np.array([b'b', b'a\0'], object)),
    'large_binary': (
        pa.array([b'a\0', b'', b'b'], pa.large_binary()),
        np.array([b'b', b'a\0'], object),
    ),
    'fixed binary': (
        pa.array([b'a\0', b'\0\0', b'bb'], pa.binary(2)),
        np.array([b'bb', b'a\0'], object),
    ),
    'timestamp': (pa.array([_DAY] * 3), _times(np.datetime64, 'us', [_DAY] * 2)),
    'timestamp with zone': (
        pa.array([_DAY.replace(tzinfo=datetime.UTC)] * 3, pa.timestamp('ms', tz='Europe/Berlin')),
        _times(np.datetime64, 'ms', [_DAY] * 2),
    ),
    'date': (pa.array([_DAY.date()] * 3), _times(np.datetime64, 'D', [_DAY.date()] * 2)),
    'time32': (
        pa.array([_DAY.time()] * 3, pa.time32('ms')),
        _times(np.timedelta64, 'ms', [_MIDNIGHT] * 2),
    ),
    'time64': (
        pa.array([_DAY.time()] * 3, pa.time64('us')),
        _times(np.timedelta64, 'us', [_MIDNIGHT] * 2),
    ),
    'duration': (pa.array([_MIDNIGHT] * 3), _times(np.timedelta64, 'us', [_MIDNIGHT] * 2)),
    'decimal': (pa.array([decimal.Decimal('1.25')] * 3), np.array([1.25, 1.25])),
    'list': (pa.array([[1.5, 2], [3, 4], [5, 6]]), np.array([[5.0, 6], [1.5, 2]])),
    'large_list': (
        pa.array([[1, 2], [3, 4], [5, 6]], pa.large_list(pa.int16())),
        np.array([[5, 6], [1, 2]], np.int16),
    ),
    'list of fixed length': (
        pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        np.array([[5, 6], [1, 2]], np.float32),
    ),
    'empty lists': (pa.array([[], [], []], pa.list_(pa.int32())), np.zeros((2, 0), np.int32)),
    'list of lists': (
        pa.array([[[1], [2]], [[3], [4]], [[5], [6]]]),
        np.array([[[5], [6]], [[1], [2]]]),
    ),
    'list of text': (pa.array([['a', 'b']] * 3), np.array([['a', 'b']] * 2)),
}


def _equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype or found.dtype.kind == expected.dtype.kind == 'U'
    np.testing.assert_array_equal(found, expected)
    assert found.flags.writeable


def _write_dataset(path: pathlib.Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), path / 'rows.parquet')
    return str(path / 'rows.parquet')


def test_every_kind_of_column_keeps_its_type(tmp_path: pathlib.Path) -> None:
    file = _write_dataset(tmp_path, {name: rows for name, (rows, _) in KINDS.items()})
    source = HuggingFace('parquet', split='train', data_files=file)
    read, one = source.gather(ROWS), source[2]
    stream = HuggingFaceStream('parquet', split='train', data_files=file)
    streamed = list(stream.shard(0, 1))
    assert list(read) == list(KINDS)
    for name, (_, expected) in KINDS.items():
        _equal(read[name], expected)
        _equal(np.stack([one[name]]), expected[:1])
        _equal(np.stack([streamed[i][name] for i in ROWS]), expected)
        spec = source.spec[name]
        assert spec.shape == expected.shape[1:]
        assert spec.dtype == expected.dtype or expected.dtype.kind == 'U'


@pytest.mark.parametrize('name', ['binary', 'timestamp', 'list of text', 'float64'])
def test_loaders_and_streams_read_every_kind(name: str, tmp_path: pathlib.Path) -> None:
    rows, _ = KINDS[name]
    file = _write_dataset(tmp_path, {'x': rows})
    source = HuggingFace('parquet', split='train', data_files=file)
    made = TrainLoader(source=source, batch_size=3, shuffle=False).block(0, 1).arrays['x'][0]
    _equal(made, source.gather(np.arange(3))['x'])
    for stream in (source, HuggingFaceStream('parquet', split='train', data_files=file)):
        loader = StreamLoader(source=stream, batch_size=3, shuffle=False)
        _equal(loader.block(0, 1).arrays['x'][0], made)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['binary', 'timestamp'])
def test_worker_processes_read_every_kind(name: str, tmp_path: pathlib.Path) -> None:
    file = _write_dataset(tmp_path, {'x': KINDS[name][0]})
    source = HuggingFace('parquet', split='train', data_files=file)
    loader = GrainLoader(source=source, batch_size=3, shuffle=False, workers=1)
    try:
        made = loader.block(0, 1).arrays['x'][0]
    finally:
        loader.close()
    _equal(made, source.gather(np.arange(3))['x'])


def test_fields_of_structs_become_fields(tmp_path: pathlib.Path) -> None:
    rows = [{'box': {'x': i, 'at': {'y': i / 2}}, 'parts': [{'n': i}, {'n': 7}]} for i in range(3)]
    file = _write_dataset(tmp_path, {k: pa.array([row[k] for row in rows]) for k in rows[0]})
    source = HuggingFace('parquet', split='train', data_files=file)
    read = source.gather(ROWS)
    assert list(read) == ['box.x', 'box.at.y', 'parts.n']
    _equal(read['box.x'], np.array([2, 0]))
    _equal(read['box.at.y'], np.array([1.0, 0.0]))
    _equal(read['parts.n'], np.array([[2, 7], [0, 7]]))
    keys = ('parts', 'box.at')
    some = HuggingFace('parquet', split='train', data_files=file, keys=keys)
    assert list(some.spec) == ['parts.n', 'box.at.y']
    stream = HuggingFaceStream('parquet', split='train', data_files=file, keys=keys)
    assert list(next(iter(stream.shard(0, 1)))) == ['parts.n', 'box.at.y']


def _features(tmp_path: pathlib.Path, rows: dict[str, Any], **features: Any) -> str:
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    made.save_to_disk(str(tmp_path / 'saved'))
    return str(tmp_path / 'saved')


def test_features_of_the_library_are_arrays(tmp_path: pathlib.Path) -> None:
    image = pytest.importorskip('PIL.Image')
    images = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    grid = np.arange(3 * 2 * 3, dtype=np.int16).reshape(3, 2, 3)
    path = _features(
        tmp_path,
        {
            'image': list(images),
            'label': ['cat', 'dog', 'cat'],
            'grid': grid.tolist(),
            'pair': [[image.fromarray(images[j]) for j in (i, 0)] for i in range(3)],
            'json': [{'a': i} for i in range(3)],
        },
        image=datasets.Image(),
        label=datasets.ClassLabel(names=['cat', 'dog']),
        grid=datasets.Array2D((2, 3), 'int16'),
        pair=datasets.List(datasets.Image()),
        json=datasets.Json(),
    )
    read = HuggingFace(path).gather(ROWS)
    _equal(read['image'], images[ROWS])
    _equal(read['label'], np.array([0, 0]))
    _equal(read['grid'], grid[ROWS])
    _equal(read['pair'], np.stack([images[[2, 0]], images[[0, 0]]]))
    assert [eval(text) for text in read['json']] == [{'a': 2}, {'a': 0}]


def test_translations_become_one_text_field_per_language(tmp_path: pathlib.Path) -> None:
    rows = {'text': [{'de': f'{i}', 'en': 'x'} for i in range(3)]}
    path = _features(tmp_path, rows, text=datasets.Translation(['de', 'en']))
    read = HuggingFace(path).gather(ROWS)
    _equal(read['text.de'], np.array(['2', '0']))
    _equal(read['text.en'], np.array(['x', 'x']))


def test_a_folder_of_images_is_read(tmp_path: pathlib.Path) -> None:
    image = pytest.importorskip('PIL.Image')
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    for number, label in enumerate(('cat', 'dog')):
        folder = tmp_path / 'train' / label
        folder.mkdir(parents=True)
        image.fromarray(pixels + number).save(folder / 'a.png')
    options = {'split': 'train', 'data_dir': str(tmp_path)}
    read = HuggingFace('imagefolder', **options).gather(np.array([1, 0]))
    _equal(read['image'], np.stack([pixels + 1, pixels]))
    _equal(read['label'], np.array([1, 0]))
    streamed = list(HuggingFaceStream('imagefolder', **options).shard(0, 1))
    _equal(np.stack([x['image'] for x in streamed]), np.stack([pixels, pixels + 1]))


@pytest.mark.parametrize('kind', ['csv', 'json'])
def test_text_files_with_floats(kind: str, tmp_path: pathlib.Path) -> None:
    text = {
        'csv': 'x,y,name\n0.5,1,a\n1.5,0,b\n,1,c\n',
        'json': '{"x": 0.5, "y": 1, "name": "a"}\n{"x": 1.5, "y": 0, "name": "b"}\n'
        '{"x": null, "y": 1, "name": "c"}\n',
    }
    (tmp_path / f'rows.{kind}').write_text(text[kind])
    options = {'split': 'train', 'data_files': str(tmp_path / f'rows.{kind}')}
    source = HuggingFace(kind, **options)
    read = source.gather(ROWS)
    _equal(read['x'], np.array([np.nan, 0.5]))
    _equal(read['y'], np.array([1, 1]))
    _equal(read['name'], np.array(['c', 'a']))
    streamed = list(HuggingFaceStream(kind, **options).shard(0, 1))
    for name in read:
        _equal(np.stack([streamed[i][name] for i in ROWS]), read[name])


def _refusal(path: str, **options: Any) -> str:
    node = {'target': 'trainer.data.hf:HuggingFace', 'path': path, **options}
    with pytest.raises(UserError) as caught:
        targets.instantiate(node, 'config.data.source')
    return str(caught.value)


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        (pa.array([1, None, 3]), "column 'x': 1 values are missing (null)"),
        (pa.array(['a', None, 'c']), "column 'x': 1 values are missing (null)"),
        (pa.array([[1, 2], None, [3, 4]]), "column 'x': 1 values are missing (null)"),
        (pa.array([[1, 2], [None, 4], [3, 4]]), "column 'x': 1 values are missing (null)"),
        (pa.array([{'a': 1}, None, {'a': 2}]), "column 'x.a': 1 values are missing (null)"),
        (pa.nulls(3), "column 'x': it has no values"),
        (pa.array([[[1]], [], [[2]]])[1:], 'lists of 0 to 1 values'),
    ],
)
def test_missing_values_are_named_at_the_start(
    rows: Any, message: str, tmp_path: pathlib.Path
) -> None:
    file = _write_dataset(tmp_path, {'x': rows, 'y': pa.array(range(len(rows)))})
    options = {'split': 'train', 'data_files': file}
    if 'lists' in message:
        with pytest.raises(ValueError, match=message):
            TrainLoader(source=HuggingFace('parquet', **options), batch_size=1)
        return
    refusal = _refusal('parquet', **options)
    assert message in refusal
    assert "keys=('y',)" in refusal
    assert list(HuggingFace('parquet', **options, keys=('y',)).spec) == ['y']


def test_audio_and_other_features_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    # Writing the feature itself takes a decoder; what is stored does not.
    stored = pa.array([{'bytes': b'RIFF', 'path': 'a.wav'}])
    features = datasets.Features(sound=datasets.Audio(), y=datasets.Value('int64'))
    table = pa.table({'sound': stored, 'y': pa.array([1])})
    path = str(tmp_path / 'saved')
    datasets.Dataset(table.cast(features.arrow_schema)).save_to_disk(path)
    refusal = _refusal(path)
    assert "column 'sound': Audio cannot be converted to arrays" in refusal
    assert "keys=('y',)" in refusal
    assert list(HuggingFace(path, keys=('y',)).spec) == ['y']


def test_lists_of_different_lengths_need_a_stream(tmp_path: pathlib.Path) -> None:
    file = _write_dataset(tmp_path, {'tokens': pa.array([[1, 2], [3], [4, 5, 6]])})
    source = HuggingFace('parquet', split='train', data_files=file)
    node = {'target': 'trainer.data.loader:TrainLoader', 'source': source, 'batch_size': 2}
    with pytest.raises(UserError) as caught:
        targets.instantiate(node, 'config.data')
    assert "column 'tokens' has lists of 1 to 3 values" in str(caught.value)
    loader = StreamLoader(source=source, batch_size=1, shuffle=False)
    assert [loader.block(i, 1).arrays['tokens'].size for i in range(3)] == [2, 1, 3]


def test_images_of_different_shapes_are_refused(tmp_path: pathlib.Path) -> None:
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    path = _features(tmp_path, {'image': images}, image=datasets.Image())
    loader = TrainLoader(source=HuggingFace(path), batch_size=1, shuffle=False)
    with pytest.raises(
        ValueError, match=r"'image' is uint8 \(5, 4, 3\), but in example 0"
    ) as caught:
        loader.block(1, 1)
    assert 'while reading example 1' in ''.join(caught.value.__notes__)


def test_duplicate_field_names_are_refused(tmp_path: pathlib.Path) -> None:
    file = _write_dataset(tmp_path, {'a.b': pa.array([1]), 'a': pa.array([{'b': 2}])})
    assert "duplicate fields ['a.b']" in _refusal('parquet', split='train', data_files=file)
