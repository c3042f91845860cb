# SPDX-License-Identifier: Apache-2.0
"""The quickstart of the Flax documentation: its model, numbers and predictions."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from tests import command
from trainer.experiment import load_and_build
from trainer.run import banner
from trainer.trainer import Trainer

CNN = '--config=configs/mnist.py'
LAYERS = {'Conv_0': 320, 'Conv_1': 18_496, 'Dense_0': 803_072, 'Dense_1': 2_570}


def test_the_config_has_the_documented_numbers() -> None:
    """824,458 parameters, SGD 0.01 with momentum 0.9, batch 32, 10 epochs of 1,875 steps."""
    experiment = load_and_build(str(command.ROOT / 'configs' / 'mnist.py'))
    params = Trainer(experiment).set_up().programs.abstract.params
    sizes = {name: sum(x.size for x in jax.tree.leaves(layer)) for name, layer in params.items()}
    assert sizes == LAYERS
    assert sum(sizes.values()) == 824_458
    optimizer = experiment.origin.config['optimizer']
    assert (optimizer['learning_rate'], optimizer['momentum']) == (0.01, 0.9)
    assert (experiment.clock.batch_size, experiment.clock.steps_per_epoch) == (32, 1875)
    assert experiment.training.total_steps == 18_750


@pytest.mark.parametrize(
    ('epochs', 'least', 'secs'),
    [
        pytest.param(1, 0.97, 1100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(10, 0.989, 7100, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_it_reaches_the_documented_accuracy(
    epochs: int, least: float, secs: float, tmp_path: pathlib.Path
) -> None:
    """Documented: 97.6 % after one epoch, 99.08 % after ten; here on all 10,000 examples."""
    train_for = f'--config.train_for={epochs}epochs'
    process = command.start(CNN, train_for, f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=secs)
    assert process.returncode == 0, errors
    result = command.result(tmp_path)
    assert result['step'] == epochs * 1875
    assert result['metrics']['eval/test/examples'] == 10_000
    assert result['metrics']['eval/test/accuracy'] >= least


def test_the_summary_sums_up() -> None:
    """All parameters in order, their total, and the FLOPs of a step."""
    experiment = load_and_build(str(command.ROOT / 'configs' / 'mnist.py'))
    trainer = Trainer(experiment)
    setup = trainer.set_up()
    text = banner.summary(trainer.experiment, setup.programs.abstract, setup.mesh, None, 0)
    table = text.split('\n\n')[0].splitlines()
    rows = [line.split() for line in table[1:-1]]
    names = [row[0] for row in rows]
    assert names == sorted(names)
    assert sum(int(row[-2].replace(',', '')) for row in rows) == 824_458
    assert table[-1].startswith('824,458 parameters')
    # Three times the multiplications of a forward pass, one of them an addition each.
    products = 32 * (28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64 + 3136 * 256 + 256 * 10)
    flops = trainer.set_up().programs.step.flops()
    assert flops is not None
    assert 0.8 < flops / (3 * 2 * products) < 1.2


@pytest.mark.slow
def test_predictions_are_written_without_padding(tmp_path: pathlib.Path) -> None:
    """A class and a probability for each of 77 examples, in batches of 32 on 2 devices."""
    options = (CNN, '--config.evals.test.data.source.limit=77', f'--workdir={tmp_path}')
    trained = command.run(*options, '--config.train_for=200steps')
    assert trained.code == 0, trained.err
    finished = command.run(*options, '--mode=predict', devices=2)
    assert finished.code == 0, finished.err
    assert 'predictions_test_200.npz: class, probability of 77 examples' in finished.out
    predictions = np.load(tmp_path / 'predictions_test_200.npz')
    assert predictions['class'].shape == predictions['probability'].shape == (77,)
    from trainer.data.mnist import MNIST

    labels = MNIST('test').gather(np.arange(77))['label']
    accuracy = float((predictions['class'] == labels).mean())
    metrics = command.result(tmp_path)['metrics']
    assert abs(accuracy - metrics['eval/test/accuracy']) < 1e-6
    (tmp_path / 'predictions_test_200.npz').unlink()
    (tmp_path / 'predictions_test_200.npz').mkdir()
    finished = command.run(*options, '--mode=predict')
    assert finished.code == 2
    path = tmp_path / 'predictions_test_200.npz'
    assert f'{path} cannot be written: Cannot overwrite: {path} is a directory' in finished.err
    assert not (tmp_path / '.predictions_test_200.npz.tmp').exists()
