# SPDX-License-Identifier: Apache-2.0
"""The example of a variational autoencoder: it resumes exactly, and it learns."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np
import pytest

from tests import command
from tests.pages import PAGES
from tests.small import one_device
from tests.tools.vae_floor import floor
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'vae.py')
FEW: dict[str, Any] = {
    'model__hidden': 8,
    'train_for': '8 steps',
    'data__source__limit': 512,
    'evals__test__every': '4 steps',
    'evals__test__data__source__limit': 100,
    'evals__test__data__batch_size': 64,
    'checkpoint__every': 'never',
    'log__every': '2 steps',
}


def trainer(variant: str = '', workdir: pathlib.Path | None = None, **changes: Any) -> Trainer:
    experiment = load_and_build(CONFIG + variant, **{**FEW, **changes})
    directory = None if workdir is None else str(workdir)
    return Trainer(experiment, directory, mesh=one_device())


@pytest.mark.parametrize('variant', ['', pytest.param(':nnx', marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same(variant: str, tmp_path: pathlib.Path) -> None:
    """Its codes, its images, and its state, although the last epoch was interrupted."""
    whole = tmp_path / 'whole'
    saves = {'checkpoint__every': '5 steps', 'checkpoint__keep_last': 2}
    trainer(variant, whole, **saves).fit()
    resumed = command.copy_until(whole, 5)
    trainer(variant, resumed, **saves).fit()
    command.assert_same_run(resumed, whole)
    shown = sorted(path.relative_to(whole) for path in whole.rglob('summaries/*/eval/test/*.png'))
    assert len(shown) == 4
    for path in shown:
        assert (resumed / path).read_bytes() == (whole / path).read_bytes()


def test_each_step_draws_other_codes() -> None:
    """On one batch and with a learning rate of 0, only the codes change the loss."""
    still = {'optimizer__learning_rate': 0.0, 'data__repeat_batch': 1, 'evals': {}}
    history = trainer(train_for='3 steps', log__every='1 steps', **still).fit().history
    assert len(set(history['train/loss'].values)) == 3
    assert len(set(history['train/kl'].values)) == 1


def test_the_test_images_are_the_same_for_every_seed() -> None:
    tests = [load_and_build(CONFIG, **FEW, seed=seed).evals['test'] for seed in (0, 1)]
    first, second = (test.data(50, None).block(0, 1).arrays['image'] for test in tests)
    np.testing.assert_array_equal(first, second)
    assert set(np.unique(first)) == {0, 1}


@pytest.mark.slow
def test_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"'image'.* expected 0 to 1.*transforms:Binarize"):
        trainer(data__transforms=()).fit()


@pytest.mark.slow
def test_the_small_variant_learns() -> None:
    """Far below the floor in half a minute; 154 nats when it was measured."""
    experiment = load_and_build(f'{CONFIG}:tiny', checkpoint__every='never')
    result = Trainer(experiment, mesh=one_device()).fit()
    assert result.metrics['eval/test/loss'] < 162
    assert result.metrics['eval/test/kl'] > 10


@pytest.mark.slow
def test_the_floor_is_the_documented_one() -> None:
    for name in ('docs/examples/index', 'docs/examples/vae'):
        assert f'{floor():.1f}' in re.findall(r'\| ([\d.]+) \|', PAGES[name].text)


@pytest.mark.learn
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('variant', ['', ':nnx'])
def test_it_reaches_the_published_loss(variant: str, tmp_path: pathlib.Path) -> None:
    """104 nats after 10 epochs."""
    process = command.start(f'--config=configs/vae.py{variant}', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=1700)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/loss'] <= 104
