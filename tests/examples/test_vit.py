# SPDX-License-Identifier: Apache-2.0
"""The example of vision transformers and mixers: variants, exact resume, another resolution."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from tests import command
from tests.small import one_device
from trainer.config.errors import UserError
from trainer.data.fashion_mnist import DIRECTORY
from trainer.experiment import load_and_build
from trainer.trainer import Trainer
from trainer.weights import Interpolate

CONFIG = str(command.ROOT / 'configs' / 'vit.py')
FEW: dict[str, Any] = {
    'model__layers': 1,
    'model__width': 16,
    'train_for': '8 steps',
    'data__batch_size': 16,
    'data__source__limit': 256,
    'evals__test__every': '4 steps',
    'evals__test__data__source__limit': 50,
    'evals__test__data__batch_size': 64,
    'evals__few_shot__every': 'never',
    'evals__few_shot__data__source__train__limit': 500,
    'evals__few_shot__data__source__test__limit': 50,
    'evals__few_shot__data__batch_size': 64,
    'checkpoint__every': 'never',
    'log__every': '2 steps',
}
VARIANTS = [':tiny', ':tiny,mixer', ':tiny,nnx', ':tiny,mixer,nnx']


def trainer(variant: str, workdir: pathlib.Path | None = None, **changes: Any) -> Trainer:
    experiment = load_and_build(CONFIG + variant, **{**FEW, **changes})
    directory = None if workdir is None else str(workdir)
    return Trainer(experiment, directory, mesh=one_device())


def test_it_trains_and_is_probed_with_few_images() -> None:
    result = trainer(':tiny', train_for='2 steps', evals__test__every='never').fit()
    assert result.status == 'finished'
    few_shot = {f'eval/few_shot/{k}_shot' for k in (1, 5, 10)}
    assert few_shot | {'eval/test/accuracy', 'train/loss'} <= result.metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_resumed_run_is_the_same(variant: str, tmp_path: pathlib.Path) -> None:
    """Its augmentation, its mixtures and its scores; the interruption is within an epoch."""
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    trainer(variant, whole).fit()
    assert trainer(variant, resumed).fit(max_steps=5).status == 'paused'
    assert trainer(variant, resumed).fit().status == 'finished'
    command.assert_same_run(resumed, whole)
    metrics = command.result(whole)['metrics']
    assert {f'eval/few_shot/{k}_shot' for k in (1, 5, 10)} <= metrics.keys()
    # One hundred images to learn from, and those of the test split.
    assert metrics['eval/few_shot/examples'] == 150


@pytest.mark.slow
@pytest.mark.parametrize('variant', [':tiny', ':tiny,nnx'])
def test_a_trained_model_goes_on_at_another_resolution(
    variant: str, tmp_path: pathlib.Path
) -> None:
    """Evaluated at 56 pixels with interpolated positions, and trained further from there."""
    trained = trainer(':tiny', tmp_path / 'small', evals={}).fit()
    before = jax.device_get(trained.state.params)
    larger = trainer(f'{variant},finetune', init_from__path=str(tmp_path / 'small'))
    state = larger.init_state()
    after = jax.device_get(state.params)
    assert (before['positions'].shape, after['positions'].shape) == ((16, 16), (64, 16))
    resample = Interpolate(pattern='positions', size=(8, 8))._resample
    np.testing.assert_array_equal(after['positions'], resample(before['positions'], False))
    blocks = after['blocks']['0'] if 'nnx' in variant else after['blocks_0']
    kernel = before['blocks_0']['mlp_in']['kernel']
    np.testing.assert_array_equal(blocks['mlp_in']['kernel'], kernel)
    evaluated = larger.evaluate(state, evaluation='test')['test']
    assert evaluated['examples'] == 50 and np.isfinite(evaluated['loss'])
    result = larger.fit()
    assert result.status == 'finished'
    assert result.metrics['eval/test/loss'] != evaluated['loss']


@pytest.mark.slow
def test_the_mixtures_differ_from_step_to_step() -> None:
    """On one batch and with a learning rate of 0, nothing else changes the loss."""
    still = {'optimizer__learning_rate': 0.0, 'data__repeat_batch': 1, 'evals': {}}
    run = trainer(':tiny', train_for='3 steps', log__every='1 steps', **still)
    state = run.init_state()
    params = jax.device_get(state.params)
    # The head is zero at first, so that all losses would be equal: now its bias decides.
    params['head']['bias'] = params['head']['bias'] + np.arange(10.0, dtype='f4')
    history = run.fit(state=state.replace(params=params)).history
    assert len(set(history['train/loss'].values)) == 3


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('large', r"unknown \['large'\]; expected some of fashion, tiny, mixer, nnx, finetune"),
        ('tiny,fashion', "one of 'fashion' and 'tiny'"),
        ('finetune', "'finetune' needs one of them"),
        ('tiny,mixer,finetune', 'a mixer fits images of one size only'),
    ],
)
def test_words_that_do_not_fit_together(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_and_build(f'{CONFIG}:{words}')


@pytest.mark.skipif(
    not pathlib.Path(DIRECTORY).exists(), reason='needs the package dataset-fashion-mnist'
)
@pytest.mark.slow
def test_clothes() -> None:
    """The variant on Fashion-MNIST trains, where that is installed."""
    assert trainer(':fashion', train_for='2 steps').fit().status == 'finished'


def test_clothes_that_are_not_installed() -> None:
    with pytest.raises(UserError, match='sudo apt-get install dataset-fashion-mnist'):
        load_and_build(f'{CONFIG}:fashion', data__source__directory='nowhere')


PREPARE = r"""
import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Pictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = tfds.features.FeaturesDict({
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=1000),
            'file_name': tfds.features.Text(),
        })
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {'train': self._generate_examples(6), 'validation': self._generate_examples(3)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        for i in range(count):
            pixels = rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3)).astype(np.uint8)
            label = {'image': Image.fromarray(pixels), 'label': 100 * i, 'file_name': str(i)}
            yield i, label


Pictures(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
"""


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['', ':mixer,nnx'])
def test_the_default_reads_a_dataset_like_imagenet(variant: str, tmp_path: pathlib.Path) -> None:
    """Photographs of different sizes, in the full setting but for the sizes of the model."""
    pytest.importorskip('PIL')
    pytest.importorskip('simplejpeg')
    pytest.importorskip('cv2')
    subprocess.run([sys.executable, '-c', PREPARE, str(tmp_path)], check=True, timeout=300)
    experiment = load_and_build(
        CONFIG + variant,
        vars__name='pictures',
        vars__data_dir=str(tmp_path),
        model__layers=1,
        model__width=36,
        data__batch_size=8,
        data__loader__workers=0,
        evals__validation__data__batch_size=4,
        train_for='2 steps',
        optimizer__learning_rate__warmup_steps='1 steps',
        checkpoint__every='never',
    )
    metrics = Trainer(experiment).fit().metrics
    assert metrics['train/loss'] == pytest.approx(np.log(1000), rel=0.2)
    assert metrics['eval/validation/examples'] == 3
    assert 'eval/validation/top5_accuracy' in metrics


@pytest.mark.slow
def test_the_small_variant_learns() -> None:
    """In half of its steps; both figures were 0.84 when it was measured."""
    result = Trainer(
        load_and_build(
            f'{CONFIG}:tiny',
            train_for='300 steps',
            evals__few_shot__every='never',
            evals__test__every='never',
            checkpoint__every='never',
        )
    ).fit()
    assert result.metrics['eval/test/accuracy'] > 0.8
    assert result.metrics['eval/few_shot/10_shot'] > 0.8


@pytest.mark.learn
@pytest.mark.timeout(10_000)
@pytest.mark.skipif(
    not pathlib.Path(DIRECTORY).exists(), reason='needs the package dataset-fashion-mnist'
)
def test_it_reaches_89_percent_of_the_clothes(tmp_path: pathlib.Path) -> None:
    """Within two hours on two CPU cores."""
    process = command.start('--config=configs/vit.py:fashion', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=9000)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/accuracy'] >= 0.89
