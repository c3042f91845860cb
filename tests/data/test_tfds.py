# SPDX-License-Identifier: Apache-2.0
"""A dataset prepared by tensorflow-datasets, read in a process without TensorFlow."""

from __future__ import annotations

import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from trainer.data.images import Decode
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.sources import ArraySpec
from trainer.data.tfds import TFDS
from trainer.data.transforms import ToFloat

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = 7

# In a process of its own, so that the class is registered nowhere else: the reader knows the
# files alone.
PREPARE = r"""
import io
import struct
import sys
import zlib

import numpy as np
import tensorflow_datasets as tfds


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = tfds.features.FeaturesDict({
            'image': tfds.features.Tensor(shape=(4, 5, 1), dtype=np.uint8),
            'label': tfds.features.ClassLabel(num_classes=7),
            'position': tfds.features.Tensor(shape=(3,), dtype=np.float32),
        })
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {'train': self._generate_examples(0, 7), 'test': self._generate_examples(5, 2)}

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            yield i, {
                'image': np.arange(20, dtype=np.uint8).reshape(4, 5, 1) + 10 * i,
                'label': i,
                'position': np.array([i, i + 0.5, -i], np.float32),
            }


def png(pixels):
    def chunk(kind, content):
        checked = kind + content
        return struct.pack('>I', len(content)) + checked + struct.pack('>I', zlib.crc32(checked))

    height, width, _ = pixels.shape
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    lines = b''.join(b'\0' + line.tobytes() for line in pixels)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(lines)) + chunk(b'IEND', b'')
    return io.BytesIO(b'\x89PNG\r\n\x1a\n' + body)


class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(4, 5, 1), encoding_format='png'),
            'label': tfds.features.ClassLabel(num_classes=3),
        })
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            pixels = np.arange(20, dtype=np.uint8).reshape(4, 5, 1) + 10 * i
            yield i, {'image': png(pixels), 'label': i}


for builder in (Tiny, Pictures):
    builder(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
assert 'tensorflow' not in sys.modules
"""

READ = """
import sys

import numpy as np

from trainer.data.tfds import TFDS

source = TFDS('tiny', split='train', data_dir=sys.argv[1])
batch = source.gather(np.array([6, 0]))
assert batch['label'].tolist() == [6, 0]
assert batch['image'][:, 3, 4, 0].tolist() == [79, 19]
TFDS('tiny', split='train', data_dir=sys.argv[1], keys=('label',)).gather(np.array([1]))
print(sorted(name for name in sys.modules if name.split('.')[0] == 'tensorflow'))
"""


def image(i: int) -> np.ndarray:
    return np.arange(20, dtype=np.uint8).reshape(4, 5, 1) + 10 * i


def run(code: str, directory: pathlib.Path) -> str:
    finished = subprocess.run(
        [sys.executable, '-c', code, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope='module')
def tfds_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp('tfds')
    run(PREPARE, directory)
    assert list(directory.glob('tiny/1.0.0/tiny-train.array_record-*'))
    return str(directory)


@pytest.mark.slow
def test_values(tfds_directory: str) -> None:
    source = TFDS('tiny', split='train', data_dir=tfds_directory)
    assert len(source) == EXAMPLES
    batch = source.gather(np.array([6, 0, 3, 3]))
    np.testing.assert_array_equal(batch['image'], np.stack([image(i) for i in (6, 0, 3, 3)]))
    assert batch['label'].tolist() == [6, 0, 3, 3]
    assert batch['position'].tolist() == [[6, 6.5, -6], [0, 0.5, 0], [3, 3.5, -3], [3, 3.5, -3]]


def test_spec(tfds_directory: str) -> None:
    assert TFDS('tiny', split='train', data_dir=tfds_directory).spec == {
        'image': ArraySpec((4, 5, 1), np.dtype('uint8')),
        'label': ArraySpec((), np.dtype('int64')),
        'position': ArraySpec((3,), np.dtype('float32')),
    }


def test_splits_and_versions(tfds_directory: str) -> None:
    test = TFDS('tiny:1.0.0', split='test', data_dir=tfds_directory)
    assert test.gather(np.arange(len(test)))['label'].tolist() == [5, 6]
    some = TFDS('tiny', split='train[2:5]', data_dir=tfds_directory)
    assert some.gather(np.arange(len(some)))['label'].tolist() == [2, 3, 4]


def test_keys(tfds_directory: str) -> None:
    source = TFDS('tiny', split='train', data_dir=tfds_directory, keys=('label', 'position'))
    assert set(source.spec) == {'label', 'position'}
    batch = source.gather(np.array([4]))
    assert set(batch) == {'label', 'position'}
    assert batch['label'].tolist() == [4]
    assert batch['position'].tolist() == [[4, 4.5, -4]]
    with pytest.raises(
        ValueError, match=r"unknown \['lable'\]; the fields are image, label, position"
    ):
        TFDS('tiny', split='train', data_dir=tfds_directory, keys=('lable',))


def test_unknown_split(tfds_directory: str) -> None:
    with pytest.raises(ValueError, match=r"Unknown split 'trian'.*'train', 'test'"):
        TFDS('tiny', split='trian', data_dir=tfds_directory)


def test_omitted_fields_are_not_decoded(tfds_directory: str) -> None:
    """Even if no image library is installed."""
    source = TFDS('pictures', split='train', data_dir=tfds_directory, keys=('label',))
    assert source.gather(np.array([2, 0]))['label'].tolist() == [2, 0]


def test_encoded_images_are_decoded_and_cropped_by_a_transform(tfds_directory: str) -> None:
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    source = TFDS('pictures', split='train', data_dir=tfds_directory, encoded=('image',))
    assert set(source.spec) == {'image', 'label'}
    decode = Decode(size=4, crop='center', center=1.0, key='image', channels=1)
    arrays = EvalLoader(source=source, batch_size=3, transforms=(decode,)).block(0, 1).arrays
    np.testing.assert_array_equal(arrays['image'][0], np.stack([image(i)[:, :4] for i in range(3)]))
    assert arrays['label'][0].tolist() == [0, 1, 2]


def test_images(tfds_directory: str) -> None:
    pytest.importorskip('PIL', reason='needs the package pillow: TFDS decodes images')
    source = TFDS('pictures', split='train', data_dir=tfds_directory)
    assert source.spec['image'] == ArraySpec((4, 5, 1), np.dtype('uint8'))
    images = source.gather(np.array([2, 0]))['image']
    np.testing.assert_array_equal(images, np.stack([image(2), image(0)]))


def test_encoded_images_are_bytes(tfds_directory: str) -> None:
    """Those of the file, for a transform that decodes them."""
    source = TFDS('pictures', split='train', data_dir=tfds_directory, encoded=('image',))
    files = source.gather(np.array([2, 0]))['image'].tolist()
    assert all(content.startswith(b'\x89PNG') for content in files)
    pillow = pytest.importorskip('PIL.Image', reason='needs the package pillow')
    for content, i in zip(files, (2, 0), strict=True):
        pixels = np.asarray(pillow.open(io.BytesIO(content)))
        np.testing.assert_array_equal(pixels, image(i)[..., 0])
    with pytest.raises(ValueError, match=r"unknown \['photo'\]; the fields are image, label"):
        TFDS('pictures', split='train', data_dir=tfds_directory, encoded=('photo',))


def test_loaders_read_a_tfds_dataset(tfds_directory: str) -> None:
    source = TFDS('tiny', split='train', data_dir=tfds_directory)
    loader = TrainLoader(source=source, batch_size=3, transforms=(ToFloat(scale=1.0),))
    block = loader.block(0, 7)
    np.testing.assert_array_equal(block.arrays['label'], block.ids)
    for pixels, i in zip(
        block.arrays['image'].reshape(21, 4, 5, 1), block.ids.ravel(), strict=True
    ):
        np.testing.assert_array_equal(pixels, image(int(i)).astype(np.float32))
    arrays = EvalLoader(source=source, batch_size=4).block(0, 2).arrays
    assert arrays['label'][arrays['_mask']].tolist() == list(range(EXAMPLES))


@pytest.mark.parametrize('name', ['tiny', 'mnist'])
def test_nothing_is_prepared_or_downloaded(tmp_path: pathlib.Path, name: str) -> None:
    """Not even a dataset that TFDS could download."""
    with pytest.raises(ValueError, match=f"cannot open split 'train' of '{name}'") as error:
        TFDS(name, split='train', data_dir=str(tmp_path))
    call = f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')"
    assert call in str(error.value)
    assert len(str(error.value).splitlines()) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorflow_is_not_imported(tfds_directory: str) -> None:
    assert run(READ, pathlib.Path(tfds_directory)).strip() == '[]'
