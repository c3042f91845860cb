# SPDX-License-Identifier: Apache-2.0
"""The example of a prepared TFDS dataset: training is equal to that on arrays in memory."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests import command
from tests.pages import FILES
from tests.small import one_device
from trainer.config import loading
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

EXAMPLES = 300
# A small CNN: the data is what differs.
FEW: dict[str, Any] = {
    'model__features': (2, 2),
    'model__hidden': 8,
    'train_for': '14 steps',  # More than an epoch.
    'evals__test__every': '5 steps',
    'checkpoint__every': 'never',
    'log__every': '1 steps',
}
IN_MEMORY = {'data__source__limit': EXAMPLES, 'evals__test__data__source__limit': EXAMPLES}


@pytest.fixture(scope='module')
def tfds_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory in which the script of the page has prepared the first examples."""
    directory = tmp_path_factory.mktemp('tfds')
    script = FILES['prepare_digits.py']
    assert script.count('MNIST(split)') == 1
    script = script.replace('MNIST(split)', f'MNIST(split, limit={EXAMPLES})')
    script += "\nimport sys\nassert 'tensorflow' not in sys.modules\n"
    finished = subprocess.run(
        [sys.executable, '-c', script],
        cwd=directory,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return str(directory / 'datasets')


def fit(name: str, workdir: pathlib.Path, *, max_steps: int | None = None, **changes: Any) -> Any:
    path = str(command.ROOT / 'configs' / f'{name}.py')
    experiment = load_and_build(path, **{**FEW, **changes})
    return Trainer(experiment, str(workdir), mesh=one_device()).fit(max_steps=max_steps)


@pytest.mark.slow
def test_training_is_equal_to_that_on_arrays(tfds_directory: str, tmp_path: pathlib.Path) -> None:
    """Bit for bit, also after a resume."""
    fit('mnist', tmp_path / 'arrays', **IN_MEMORY)
    records = {'vars__name': 'digits', 'vars__data_dir': tfds_directory}
    assert fit('tfds_mnist', tmp_path / 'tfds', max_steps=6, **records).status == 'paused'
    assert fit('tfds_mnist', tmp_path / 'tfds', **records).status == 'finished'
    command.assert_same_run(tmp_path / 'tfds', tmp_path / 'arrays')


@pytest.mark.slow
def test_worker_processes_read_the_same(tfds_directory: str, tmp_path: pathlib.Path) -> None:
    records = {'vars__name': 'digits', 'vars__data_dir': tfds_directory}
    workers = {'target': 'trainer.data.grain_loader:GrainLoader', 'workers': 1}
    fit('tfds_mnist', tmp_path / 'one', **records)
    fit('tfds_mnist', tmp_path / 'other', **records, data__loader=workers)
    command.assert_same_run(tmp_path / 'one', tmp_path / 'other')


def test_the_configs_differ_in_the_source_alone() -> None:
    mnist, tfds = (
        loading.to_plain(loading.load(str(command.ROOT / 'configs' / f'{name}.py')).config)
        for name in ('mnist', 'tfds_mnist')
    )
    del tfds['vars']
    for config in (mnist, tfds):
        for data in (config['data'], config['evals']['test']['data']):
            source = data.pop('source')
            assert source['split'] == ('train' if data is config['data'] else 'test')
    assert mnist == tfds


def test_the_error_says_how_to_prepare_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as error:
        fit('tfds_mnist', tmp_path / 'run', vars__data_dir=str(tmp_path))
    *_, builder, prepare = str(error.value).splitlines()
    assert builder.strip() == (
        f"builder = tfds.builder('mnist', data_dir='{tmp_path}', file_format='array_record')"
    )
    assert prepare.strip() == 'builder.download_and_prepare()'
