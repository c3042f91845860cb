# SPDX-License-Identifier: Apache-2.0
"""The example of translation: exact resume, exact scores, files of one's own, and it learns."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from tests import command
from tests.pages import PAGES
from tests.tools.translation_floor import floor
from trainer.config import loading
from trainer.config.errors import UserError
from trainer.evaluate.translation import score_texts
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'wmt.py')
needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec('sacrebleu') is None, reason='needs the package sacrebleu'
)
FEW: dict[str, Any] = {
    'model__width': 8,
    'model__layers': 1,
    'model__heads': 2,
    'model__dropout_rate': 0.1,
    'vars__vocab_size': 300,
    'train_for': '6 steps',
    'data__batch_size': 8,
    'checkpoint__every': 'never',
    'log__every': '2 steps',
}
NUMBERS: dict[str, Any] = {
    'data__source__items__pairs__count': 50,
    'data__source__items__vocabulary__pairs__count': 50,
    'data__source__lengths': (40,),
    'evals__test__every': '3 steps',
    'evals__test__data__source__items__pairs__count': 20,
    'evals__test__data__source__items__vocabulary__pairs__count': 50,
    'evals__test__score__vocabulary__pairs__count': 50,
    'evals__test__data__source__lengths': (40,),
    'evals__test__data__batch_size': 16,
    'evals__test__task__extra_tokens': 0,
}


@pytest.fixture(scope='module')
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp('bpe'))


def trainer(
    variant: str,
    vocabularies: str,
    workdir: pathlib.Path | None = None,
    devices: int = 1,
    **changes: Any,
) -> Trainer:
    few = {**FEW, **(NUMBERS if variant == ':numbers' else {})}
    if changes.get('evals') == {}:
        few = {name: x for name, x in few.items() if not name.startswith('evals__')}
    experiment = load_and_build(
        CONFIG + variant, **{**few, 'vars__vocabulary': vocabularies, **changes}
    )
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ('data',), types, devices=jax.devices()[:devices])
    return Trainer(experiment, None if workdir is None else str(workdir), mesh=mesh)


def fit_twice(directory: pathlib.Path, vocabularies: str, **changes: Any) -> pathlib.Path:
    """Checks that a run that is interrupted equals one that is not, and returns the latter."""
    whole, resumed = directory / 'whole', directory / 'resumed'
    trainer(':numbers', vocabularies, whole, **changes).fit()
    paused = trainer(':numbers', vocabularies, resumed, **changes).fit(max_steps=4)
    assert paused.status == 'paused'
    assert trainer(':numbers', vocabularies, resumed, **changes).fit().status == 'finished'
    command.assert_same_run(resumed, whole)
    return whole


def test_a_resumed_run_is_the_same(tmp_path: pathlib.Path, vocabularies: str) -> None:
    """It drops the same activations."""
    saves = {'checkpoint__every': '3 steps', 'checkpoint__keep_last': 2}
    changes = {'evals': {}, 'ema': None, 'log__tensorboard': False, **saves}

    def fit(path: pathlib.Path) -> None:
        trainer(':numbers', vocabularies, path, **changes).fit()

    command.assert_resumes(fit, tmp_path / 'whole', 3)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_buckets_and_samples(
    tmp_path: pathlib.Path, vocabularies: str
) -> None:
    buckets = {'data__source__lengths': (24, 32, 40), 'data__source__group': 16}
    whole = fit_twice(tmp_path, vocabularies, **buckets)
    shown = sorted(path.relative_to(whole) for path in whole.rglob('samples.txt'))
    assert len(shown) == 2
    for path in shown:
        assert (tmp_path / 'resumed' / path).read_bytes() == (whole / path).read_bytes()
        assert re.match(
            r'source:      [a-z]+[\w -]*\nreference:   \w+\n', (whole / path).read_text()
        )


@pytest.mark.slow
def test_scores_do_not_depend_on_devices_and_batches(vocabularies: str) -> None:
    """Each pair counts once, although the last batch has padding, and has the same translation."""
    found, tokens = [], []
    for devices, batch in ((1, 16), (8, 24)):
        changes = {'evals__test__data__batch_size': batch}
        run = trainer(':numbers', vocabularies, devices=devices, **changes)
        # Larger parameters: the fresh model has nearly the same logits for all tokens.
        params = jax.tree.map(
            lambda x: jax.device_put(3 * np.asarray(x), x.sharding), run.init_state().params
        )
        state = run.init_state().replace(params=params, ema=params)
        found.append(run.evaluate(state, evaluation='test')['test'])
        tokens.append(np.concatenate([x['tokens'] for x in run.predict('test', state)]))
    np.testing.assert_array_equal(*tokens)
    assert len(np.unique(tokens[0], axis=0)) > 5
    for name in ('loss', 'accuracy', 'exact_match'):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    assert found[0]['examples'] == found[1]['examples'] == 20
    assert np.log(found[0]['perplexity']) == pytest.approx(found[0]['loss'], rel=1e-5)


def write_pairs(directory: pathlib.Path) -> str:
    """Writes the three splits of a small language pair, and returns their pattern."""
    for split in ('train', 'dev', 'test'):
        lines = [f'one {word} cat\tun gato {word}o\n' for word in ('red', 'big', 'old', 'new')]
        (directory / f'{split}.tsv').write_text(''.join(lines * 4))
    return str(directory / '{split}.tsv')


FILES: dict[str, Any] = {
    'data__batch_size': 8,
    'precision': None,
    **{f'evals__{split}__data__batch_size': 8 for split in ('dev', 'test')},
    **{f'evals__{split}__task__extra_tokens': 0 for split in ('dev', 'test')},
    **{f'evals__{split}__score__metrics': () for split in ('dev', 'test')},
}


@pytest.mark.slow
def test_files_of_ones_own(tmp_path: pathlib.Path, vocabularies: str) -> None:
    """The full setting, on a mesh of three axes: it learns what it learns on one of one axis."""
    losses = []
    for axes in ({'data': 2, 'fsdp': 2, 'model': 2}, {'data': 8, 'fsdp': 1, 'model': 1}):
        options = {**FEW, **FILES, 'vars__path': write_pairs(tmp_path), 'mesh': axes}
        options |= {'vars__vocabulary': vocabularies, 'model__dropout_rate': 0.0}
        options |= {'data__source__lengths': (32,), 'optimizer__learning_rate__warmup_steps': 3}
        options |= {'optimizer__learning_rate__peak_value': 0.02, 'evals__test__final': False}
        options |= {f'evals__{split}__data__source__lengths': (32,) for split in ('dev', 'test')}
        result = Trainer(load_and_build(CONFIG, **options)).fit()
        assert result.metrics['eval/dev/examples'] == 16
        losses.append(result.metrics['eval/dev/loss'])
    assert max(losses) < 5  # 7 before the first step.
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_tokens(tmp_path: pathlib.Path, vocabularies: str) -> None:
    """Those of other texts, in the same file."""
    options: dict[str, Any] = {'vars__path': write_pairs(tmp_path), 'evals': {}, 'precision': None}
    options |= {'mesh': {'data': 1}, 'sharding': ()}
    options |= {'data__source__lengths': (32,), 'log__tensorboard': False}
    workdir = tmp_path / 'run'
    trainer('', vocabularies, workdir, **options).fit(max_steps=2)
    train = tmp_path / 'train.tsv'
    train.write_text(train.read_text().replace('cat', 'dog'))
    with pytest.raises(UserError, match='of a model of other tokens'):
        trainer('', vocabularies, workdir, **options).fit()


@pytest.mark.slow
@needs_sacrebleu
def test_verses(vocabularies: str) -> None:
    """With BLEU, and longer verses than the longest batch."""
    few = {f'evals__{split}__data__source__items__pairs__limit': 10 for split in ('dev', 'test')}
    few |= {f'evals__{split}__task__extra_tokens': 0 for split in ('dev', 'test')}
    few |= {f'evals__{split}__data__source__lengths': (16,) for split in ('dev', 'test')}
    few['data__source__lengths'] = (96,)
    result = trainer(':verses', vocabularies, **few).fit()
    for split in ('dev', 'test'):
        assert result.metrics[f'eval/{split}/examples'] == 10
        assert 0 <= result.metrics[f'eval/{split}/bleu'] < 5
        assert 0 <= result.metrics[f'eval/{split}/chrf'] < 30


def test_a_word_that_the_config_does_not_know() -> None:
    with pytest.raises(UserError, match='wmt: expected verses, numbers or nothing after :'):
        load_and_build(f'{CONFIG}:large')


def test_all_splits_have_one_vocabulary() -> None:
    """That of training, in the sources and in the scores."""
    for variant in ('', ':verses', ':numbers'):
        config = loading.load(CONFIG + variant).config
        given = [config.data.source['items'].vocabulary]
        for each in config.evals.values():
            given += [each.data.source['items'].vocabulary, each.score.vocabulary]
        assert {str(each.to_dict()) for each in given} == {str(given[0].to_dict())}
        assert given[0].pairs == config.data.source['items'].pairs


@pytest.mark.learn
@pytest.mark.timeout(1200)
def test_number_words_are_translated_without_mistakes(tmp_path: pathlib.Path) -> None:
    process = command.start('--config=configs/wmt.py:numbers', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=1100)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/exact_match'] > 0.99


@pytest.mark.slow
@needs_sacrebleu
def test_the_floor_is_the_documented_one() -> None:
    found = floor('test')
    assert f'| {found["bleu"]:.1f} BLEU' in PAGES['docs/examples/index'].text
    page = PAGES['docs/examples/wmt'].text
    assert f'| {found["bleu"]:.1f} | {found["chrf"]:.1f} |' in page
    signatures: Any = score_texts(['a'], ['a'], ['bleu'])['signatures']
    assert signatures.texts[0].removeprefix('BLEU ').split('version:')[0] + 'version:' in page


@pytest.mark.learn
@pytest.mark.timeout(10_000)
@needs_sacrebleu
def test_it_reaches_12_bleu(tmp_path: pathlib.Path) -> None:
    process = command.start('--config=configs/wmt.py:verses', f'--workdir={tmp_path}')
    [(_, errors)] = command.ends(process, secs=9_900)
    assert process.returncode == 0, errors
    assert command.result(tmp_path)['metrics']['eval/test/bleu'] > 12
