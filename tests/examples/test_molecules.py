# SPDX-License-Identifier: Apache-2.0
"""The example of molecules: graphs of several shapes, missing labels, and what it learns."""

from __future__ import annotations

import logging
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tests import command
from tests.pages import PAGES
from tests.tools.molecules_floor import score_counts, score_fingerprints
from trainer.config import loading
from trainer.configs import molecules as configured
from trainer.data.molecules import Molecules, read, save
from trainer.experiment import build, load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'molecules.py')
FEW: dict[str, Any] = {
    'model__width': 4,
    'model__rounds': 1,
    'train_for': '8 steps',
    'data__source__items__limit': 60,
    'data__batch_size': 7,
    'evals__dev__every': '4 steps',
    'evals__dev__data__source__items__limit': 25,
    'evals__dev__data__batch_size': 15,
    'evals__test__data__source__items__limit': 20,
    'evals__test__data__batch_size': 7,
    'checkpoint__every': '4 steps',
    'log__every': '2 steps',
    'log__tensorboard': False,
}


def mesh(devices: int = 1) -> Any:
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ('data',), types, devices=jax.devices()[:devices])


def trainer(workdir: pathlib.Path | None = None, devices: int = 1, **changes: Any) -> Trainer:
    options = {**FEW, **changes}
    if changes.get('evals') == {}:
        options = {name: x for name, x in options.items() if not name.startswith('evals__')}
    experiment = load_and_build(CONFIG, **options)
    return Trainer(experiment, None if workdir is None else str(workdir), mesh=mesh(devices))


def test_a_resumed_run_is_the_same(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the same batches, drops the same units and has the same statistics; without a warning.

    Some of the rows are of molecules without one of the labels.
    """
    # Large enough for any batch, so that one program is compiled.
    changes = {'evals': {}, 'data__source__sizes': ((512, 1024),), 'checkpoint__keep_last': 2}
    logging.getLogger('trainer').propagate = True
    command.assert_resumes(lambda path: trainer(path, **changes).fit(), tmp_path / 'whole', 4)
    assert caplog.messages == []
    rows = command.rows(tmp_path / 'whole')
    assert None in [row['train/logbb_loss'] for row in rows if 'train/loss' in row]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_shapes_and_scores(tmp_path: pathlib.Path) -> None:
    whole = tmp_path / 'whole'
    changes = {'checkpoint__keep_last': 2}
    trainer(whole, **changes).fit()
    resumed = command.copy_until(whole, 4)
    trainer(resumed, **changes).fit()
    command.assert_same_run(resumed, whole)
    texts = [path.relative_to(whole) for path in whole.rglob('summaries/*/eval/dev/*')]
    assert len(texts) == 2
    for path in texts:
        assert (resumed / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.slow
def test_metrics_do_not_depend_on_batches_or_devices() -> None:
    """They are those of the molecules, for other sizes and on eight devices."""
    changes: list[dict[str, Any]] = [
        {},
        {'devices': 8},
        {'evals__dev__data__batch_size': 4, 'evals__dev__data__source__num_shapes': 1},
    ]
    found = []
    for change in changes:
        run = trainer(**change)
        found.append(run.evaluate(run.init_state(), evaluation='dev')['dev'])
    assert found[0]['examples'] == 25
    for metrics in found:
        names = set(metrics) - {'mistakes'}
        assert {'auc', 'average_precision', 'bbb_accuracy', 'logbb_loss', 'loss'} <= names
        for name in names:
            assert metrics[name] == pytest.approx(found[0][name], rel=1e-4), name


class ManyDecisions(Molecules):
    """Three decisions for each molecule, of which some are missing; the last one is always no."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        bits = np.random.default_rng(index).integers(-1, 2, 3)
        return {**example, 'many': np.array([*bits[:2], min(bits[2], 0)], np.int32)}


@pytest.mark.slow
def test_mean_average_precision_of_many_decisions() -> None:
    """As of ogbg-molpcba: over those with a label, and without those that are never positive."""
    precision = {'target': 'trainer.metrics:AveragePrecision', 'skip_absent': True}
    task = {
        'target': 'trainer.tasks:Classification', 'inputs': 'graph', 'label': 'many',
        'loss': 'sigmoid', 'ignore_label': -1, 'extra_metrics': {'precision': precision},
    }  # fmt: skip
    items = {'target': f'{__name__}:ManyDecisions', 'split': 'dev', 'limit': 25}
    source = {'target': 'trainer.data.graphs:GraphSource', 'items': items}
    config = configured.get_config()
    with config.ignore_type():
        config.vars = {}
        config.model.outputs = (3,)
        config.model.width = 4
        config.task = task
        config.data = {'source': source, 'batch_size': 7}
        config.evals = {'dev': {'every': 'never', 'data': {'source': source}}}
    run = Trainer(build(config), mesh=mesh())
    state = run.init_state()
    found = run.evaluate(state, evaluation='dev')['dev']['precision']
    predicted = [batch['probabilities'] for batch in run.predict('dev', state=state)]
    scores, examples = np.concatenate(predicted), ManyDecisions('dev', limit=25)
    labels = np.stack([examples[i]['many'] for i in range(25)])
    assert (labels == -1).any(0).all() and (labels[:, 2] < 1).all()
    each = [
        average_precision_score(labels[known, i], scores[known, i])
        for i, known in enumerate((labels >= 0).T[:2])
    ]
    assert found == pytest.approx(np.mean(each))


@pytest.mark.slow
def test_training_is_the_same_on_eight_devices() -> None:
    """But for rounding: each has graphs of its own, and batch norm is that of all."""
    still = {'model__dropout_rate': 0.0, 'evals': {}, 'log__every': '1 step'}
    one, eight = (
        trainer(devices=devices, **still).fit().history['train/loss'].values for devices in (1, 8)
    )
    np.testing.assert_allclose(one, eight, rtol=1e-3)
    assert one[-1] < one[0]


@pytest.mark.slow
def test_a_label_that_is_missing_everywhere_trains(tmp_path: pathlib.Path) -> None:
    """The metrics of its part are NaN, and the others are finite."""
    file = read(command.ROOT / 'data' / 'molecules' / 'blood_brain_barrier.npz')
    missing = {**file.labels, 'logbb': np.full_like(file.labels['logbb'], np.nan)}
    save(tmp_path / 'mine.npz', file._replace(labels=missing))
    result = trainer(vars__path=str(tmp_path / 'mine.npz')).fit()
    assert np.isnan(result.metrics['eval/dev/logbb_loss'])
    assert np.isfinite(result.metrics['eval/dev/bbb_loss'])
    assert np.isfinite(result.metrics['train/grad_norm'])


@pytest.mark.slow
def test_molecules_of_one_s_own(tmp_path: pathlib.Path) -> None:
    """A saved run predicts from their SMILES, without labels."""
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    workdir = tmp_path / 'run'
    trainer(workdir).fit()
    mine = {'target': 'trainer.data.smiles:SmilesGraphs', 'smiles': ('CCO', 'c1ccccc1')}
    options = {name: x for name, x in FEW.items() if 'test__data__source' not in name}
    changes = {'evals__test__score': None, 'evals__test__data__source__items': mine}
    experiment = load_and_build(CONFIG, **options, **changes)
    [predicted] = Trainer(experiment, str(workdir), mesh=mesh()).predict('test')
    assert predicted['smiles'].tolist() == ['CCO', 'c1ccccc1']
    assert predicted['bbb_probabilities'].shape == (2, 1)
    assert predicted['logbb_prediction'].shape == (2,)


@pytest.mark.slow
def test_the_small_variant_learns() -> None:
    """0.357 when it was measured; the floor is 1.02."""
    experiment = load_and_build(f'{CONFIG}:tiny', checkpoint__every='never')
    result = Trainer(experiment, mesh=mesh()).fit()
    assert result.metrics['eval/test/loss'] < 0.6 < score_counts()


def test_the_floor_of_the_solubility_is_the_documented_one() -> None:
    assert f'{score_counts():.2f}' in _figures('docs/examples/molecules')


@pytest.mark.slow
def test_the_floors_are_the_documented_ones() -> None:
    pytest.importorskip('rdkit', reason='needs the package rdkit')
    for kind in ('random', 'scaffold'):
        for name in ('docs/examples/index', 'docs/examples/molecules'):
            auc, _ = score_fingerprints(kind)['test']
            assert f'{auc:.3f}' in _figures(name)


def _figures(page: str) -> list[str]:
    return re.findall(r'\| (\d\.\d+)', PAGES[page].text)


@pytest.mark.learn
@pytest.mark.timeout(2000)
@pytest.mark.parametrize(('variant', 'goal'), [('', 0.95), (':scaffold', 0.76)])
def test_it_is_above_its_floor(variant: str, goal: float, tmp_path: pathlib.Path) -> None:
    process = command.start(f'--config=configs/molecules.py{variant}', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=1900)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/auc'] > goal


def test_another_word_is_an_error() -> None:
    with pytest.raises(Exception, match="expected 'scaffold', 'solubility', 'tiny' or nothing"):
        loading.load(f'{CONFIG}:random')
