# SPDX-License-Identifier: Apache-2.0
"""Folders of image files: their classes and splits, and how images are decoded and cropped."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests import command
from trainer.config.errors import UserError
from trainer.data import images
from trainer.data.grain_loader import GrainLoader
from trainer.data.image_codec import central_box, random_box
from trainer.data.images import ImageFolder
from trainer.data.loader import EvalLoader, TrainLoader
from trainer.data.rng import ExampleRng
from trainer.data.transforms import RandomFlip
from trainer.experiment import build
from trainer.trainer import Trainer


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Returns a smooth picture, as compression and resizing change noise."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, channels))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    rows = corners[0] * (1 - y[..., None, :]) + corners[1] * y[..., None, :]
    mixed = rows[:, :, 0] * (1 - x) + rows[:, :, 1] * x
    return mixed.astype(np.uint8)


def encode(pixels: np.ndarray, kind: str, mode: str = 'RGB') -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(mode)
    options = {'quality': 95} if kind == 'JPEG' else {}
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three classes of images of many sizes: 5 cats, 4 dogs, one of them further below, 3 owls."""
    root = tmp_path_factory.mktemp('images')
    files = [f'cat/{i}.jpg' for i in range(5)] + ['dog/0.png', 'dog/1.JPEG', 'dog/2.png']
    files += ['dog/more/3.jpg', 'owl/0.png', 'owl/1.png', 'owl/2.jpg']
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = 'PNG' if name.endswith('png') else 'JPEG'
        (root / name).write_bytes(encode(picture(40 + 3 * i, 70 - 2 * i, i), kind))
    (root / 'dog' / 'notes.txt').write_text('no image')
    (root / '.cache').mkdir()
    return root


@pytest.fixture
def decode() -> Callable[..., images.Decode]:
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    return images.Decode


def contents(*files: bytes) -> dict[str, np.ndarray]:
    array = np.empty(len(files), object)
    array[:] = files
    return {'file': array}


def rng(n: int, epoch: int = 0) -> ExampleRng:
    return ExampleRng(0, 0, np.full(n, epoch), np.arange(n))


def test_classes_and_files_are_in_the_order_of_names(folder: pathlib.Path) -> None:
    source = ImageFolder(folder)
    assert source.classes == ('cat', 'dog', 'owl')
    assert len(source) == 12
    batch = source.gather(np.array([8, 0, 11]))
    assert batch['label'].tolist() == [1, 0, 2] and batch['label'].dtype == np.int32
    names = [str(pathlib.Path(path).relative_to(folder)) for path in batch['path']]
    assert names == ['dog/more/3.jpg', 'cat/0.jpg', 'owl/2.jpg']
    assert batch['path'].dtype == source.spec['path'].dtype
    assert source.describe(5) == str(folder / 'dog' / '0.png')


def test_a_file_lists_a_split(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'train.txt').write_text('owl/1.png\ncat/4.jpg\n\n')
    source = ImageFolder(folder, files=tmp_path / 'train.txt')
    assert source.gather(np.arange(2))['label'].tolist() == [2, 0]
    assert source.describe(0).endswith('owl/1.png')


def test_classes_can_be_chosen(folder: pathlib.Path) -> None:
    source = ImageFolder(folder, classes=('owl', 'cat'), limit=4)
    assert source.gather(np.arange(4))['label'].tolist() == [0, 0, 0, 1]


def test_splits_in_directories_of_their_own(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A class that one of them lacks, or has alone, would shift the labels of the others."""
    (tmp_path / 'owl').mkdir()
    (tmp_path / 'owl' / '7.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match=rf'{tmp_path} has no directory cat, dog; create an empty'):
        ImageFolder(tmp_path, like=folder)
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'dog').mkdir()
    source = ImageFolder(tmp_path, like=folder)
    assert source.classes == ('cat', 'dog', 'owl')
    assert source.gather(np.arange(1))['label'].tolist() == [2]
    (tmp_path / 'bee').mkdir()
    with pytest.raises(ValueError, match=rf'like: {tmp_path} has bee, which {folder} does not'):
        ImageFolder(tmp_path, like=folder)
    with pytest.raises(ValueError, match='like: there is no directory nowhere'):
        ImageFolder(tmp_path, like='nowhere')
    with pytest.raises(ValueError, match='classes, like: expected at most one of them'):
        ImageFolder(tmp_path, like=folder, classes=('cat',))


def test_mistakes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f'path: there is no directory {tmp_path}/no'):
        ImageFolder(tmp_path / 'no')
    with pytest.raises(ValueError, match=r'no images in the directories of .*CLASS/NAME\.jpg'):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match='has no directory bee'):
        ImageFolder(folder, classes=('cat', 'bee'))
    for line, message in (
        ('bee/1.jpg', "lists 'bee/1.jpg'; expected CLASS/NAME, and the classes are cat, dog"),
        ('cat/9.jpg', "lists 'cat/9.jpg', which .* does not have"),
    ):
        (tmp_path / 'split.txt').write_text(line)
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder, files=tmp_path / 'split.txt')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'BMP'])
@pytest.mark.parametrize('height', [61, 150, 400])
def test_a_central_crop_is_that_of_pillow(decode: Any, kind: str, height: int) -> None:
    """Of images that are enlarged, shrunk, and shrunk by more than half."""
    pixels = picture(height, height + 40)
    made = decode(size=64, crop='center', key='file')(contents(encode(pixels, kind)), rng(1))
    top, left, side, _ = central_box(height, height + 40, 0.875)
    part = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    expected = np.asarray(part.resize((64, 64), Image.Resampling.BILINEAR), np.int32)
    difference = np.abs(made['image'][0].astype(np.int32) - expected)
    assert difference.mean() < 1.5 and difference.max() < 12


@pytest.mark.parametrize(
    ('mode', 'kind'),
    [('L', 'JPEG'), ('CMYK', 'JPEG'), ('L', 'PNG'), ('P', 'PNG'), ('RGBA', 'PNG')],
)
@pytest.mark.parametrize('channels', [1, 3])
def test_other_kinds_of_color(decode: Any, mode: str, kind: str, channels: int) -> None:
    content = encode(picture(32, 32), kind, mode)
    made = decode(size=32, crop='center', center=1.0, key='file', channels=channels)
    image = made(contents(content), rng(1))['image'][0]
    wanted = Image.open(io.BytesIO(content)).convert('RGB').convert('L' if channels == 1 else 'RGB')
    expected = np.asarray(wanted, np.int32).reshape(32, 32, channels)
    assert np.abs(image.astype(np.int32) - expected).mean() < 3


def test_random_crops_are_within_the_limits() -> None:
    draws = np.random.default_rng(0).uniform(size=(2000, 10, 4))
    for height, width in ((90, 120), (300, 50)):
        boxes = np.array(
            [random_box(height, width, each, (0.08, 1.0), (0.5, 2.0)) for each in draws]
        )
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
        assert (w / h > 0.48).all() and (w / h < 2.05).all()
        assert {top.min(), left.min()} == {0}
        assert (top + h).max() == height and (left + w).max() == width
        assert len(set(map(tuple, boxes))) > 400


def test_an_image_that_no_proposal_fits() -> None:
    """The largest central part within the ratios."""
    draws = np.full((10, 4), 0.999)
    assert random_box(10, 1000, draws, (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 13)
    assert random_box(1000, 9, draws, (0.9, 1.0), (3 / 4, 4 / 3)) == (494, 0, 12, 9)


def test_a_crop_follows_from_epoch_and_example(decode: Any) -> None:
    batch = contents(*[encode(picture(80, 90), 'JPEG')] * 3)
    transform = decode(size=32, crop='random', key='file')
    first, again, later = (transform(batch, rng(3, epoch))['image'] for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != later).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize(
    'change',
    [lambda x: x[: len(x) // 2], lambda x: b'', lambda x: b'\xff\xd8' + x[300:], lambda x: b'text'],
)
def test_damaged_files_are_named(decode: Any, change: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'a').mkdir()
    content = encode(picture(80, 90), 'JPEG')
    for i in range(6):
        (tmp_path / 'a' / f'{i}.jpg').write_bytes(change(content) if i == 4 else content)
    loader = EvalLoader(
        source=ImageFolder(tmp_path),
        batch_size=6,
        transforms=(decode(size=8, crop='center'),),
    )
    with pytest.raises(ValueError) as error:
        loader.block(0, 1)
    assert f'while reading {tmp_path}/a/4.jpg' in '\n'.join(error.value.__notes__)


def test_wrong_arguments(decode: Any) -> None:
    for arguments, message in (
        ({'crop': 'middle'}, "crop: expected 'random' or 'center', got 'middle'"),
        ({'channels': 4}, 'channels: expected 3 for RGB or 1 for grey, got 4'),
        ({'area': (0.5, 1.5)}, r'area: expected \(smallest, largest\), got \(0.5, 1.5\)'),
        ({'center': 0.0}, 'a share from above 0 to 1; got 8 and 0.0'),
    ):
        with pytest.raises(ValueError, match=message):
            decode(**{'size': 8, 'crop': 'center', **arguments})


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'simplejpeg and cv2: pip install .*\[images\]'):
        images.Decode(size=8, crop='center')


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_threads_and_workers_read_what_one_thread_reads(
    decode: Any, workers: int, folder: pathlib.Path
) -> None:
    options = {
        'source': ImageFolder(folder),
        'batch_size': 5,
        'transforms': (decode(size=16, crop='random'), RandomFlip()),
        'seed': 3,
    }
    expected = TrainLoader(**options).block(2, 4)
    loader = GrainLoader(workers=workers, task_rows=2, **options)
    try:
        found = loader.block(2, 4)
    finally:
        loader.close()
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.arrays['image'], expected.arrays['image'])


def config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    made = ml_collections.ConfigDict()
    made.train_for = '10 steps'
    made.model = dict(target='trainer.models.mlp:MLP', features=(4, 3))
    made.task = dict(target='trainer.tasks:Classification')
    made.optimizer = dict(target='optax:sgd', learning_rate=0.1)
    source = dict(target='trainer.data.images:ImageFolder', path=str(folder))
    to_float = dict(target='trainer.data.transforms:ToFloat')

    def crop(name: str) -> dict[str, Any]:
        return dict(target='trainer.data.images:Decode', size=8, crop=name)

    made.data = dict(
        source=source,
        transforms=(crop('random'), dict(target='trainer.data.transforms:RandomFlip')),
        device_transforms=(to_float,),
        loader=dict(target='trainer.data.grain_loader:GrainLoader', threads=2),
        batch_size=8,
    )
    data = dict(
        source=source, transforms=(crop('center'),), device_transforms=(to_float,), batch_size=8
    )
    made.evals = dict(test=dict(every='5 steps', data=data))
    made.checkpoint = dict(every='never')
    made.log = dict(every='1 step')
    return made


@pytest.mark.slow
def test_a_resumed_run_is_the_same(
    decode: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name, stops in (('whole', ()), ('resumed', (3,))):
        for stop in (*stops, None):
            trainer = Trainer(build(config(folder)), str(tmp_path / name))
            trainer.fit(max_steps=stop)
    command.assert_same_run(tmp_path / 'resumed', tmp_path / 'whole')


def test_a_config_without_the_packages_says_so(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, 'check_installed', _not_installed)
    with pytest.raises(UserError, match=r'config.data.transforms\[0\].*pip install'):
        build(config(folder))


def _not_installed() -> None:
    raise ImportError("decoding images needs simplejpeg: pip install 'jax-config-trainer[images]'")
