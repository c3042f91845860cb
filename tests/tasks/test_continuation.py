# SPDX-License-Identifier: Apache-2.0
"""Text that an evaluation generates: by the form of the model that decodes, or without a cache."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from tests.marks import slow_after
from tests.parallel import group
from trainer.config.errors import UserError
from trainer.config.loading import LoadedConfig
from trainer.data.prompts import Prompts
from trainer.experiment import build
from trainer.models.decoding import with_cache
from trainer.models.generation import generate
from trainer.tasks import Continuation
from trainer.trainer import Trainer

TEXTS = ('import os', 'a', 'def f', 'return', 'x = 1', 'b', 'for i in range', 'pass')


class Network(nnx.Module):
    """A model of NNX without a cache, which predicts from the last token only."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 8, rngs=rngs)
        self.logits = nnx.Linear(8, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.embed(tokens))


TRANSFORMER = dict(
    target='trainer.models.transformer:Transformer', layers=1, width=8, heads=2, max_length=20
)
DECODING: dict[str, Any] = {'model': {'decode': True}}
WITHOUT_CACHE = {'decoder': dict(ref='trainer.models.decoding:without_cache')}


DRAWING: dict[str, Any] = {'temperature': 0.7, 'top_k': 40, 'top_p': 0.95, 'stop': (0, 1, 2)}


def make_config(
    task: dict[str, Any],
    *,
    network: Any = TRANSFORMER,
    ensemble: Any = None,
    precision: Any = None,
    **evaluation: Any,
) -> ConfigDict:
    """Returns a config of one step whose evaluation `samples` continues all of `TEXTS`."""
    prompts = dict(target='trainer.data.prompts:Prompts', texts=TEXTS)
    generated = dict(
        target='trainer.tasks:Continuation',
        generate=dict(ref='trainer.models.generation:generate'),
        inputs='tokens',
        lengths='length',
        count=6,
    )
    samples = dict(
        data=dict(source=prompts, batch_size=8),
        task={**generated, **task},
        score=dict(target='trainer.scores:Samples', count=3),
        **evaluation,
    )
    return ConfigDict(
        dict(
            train_for='1 step',
            model=network,
            task=dict(target='trainer.tasks:NextToken'),
            data=dict(source=prompts, batch_size=8),
            # An update would depend on the number of devices, which sum gradients in another order.
            optimizer=dict(target='optax:sgd', learning_rate=0.0),
            ensemble=ensemble,
            precision=precision,
            evals=dict(samples=samples),
        )
    )


def make_trainer(
    task: dict[str, Any], *, workdir: Any = None, devices: int = 1, **options: Any
) -> Trainer:
    """Returns a run of `make_config`."""
    config = make_config(task, **options)
    experiment = build(LoadedConfig(config=config, name='samples', arg='', path=''))
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ('data',), types, devices=jax.devices()[:devices])
    return Trainer(experiment, workdir, mesh=mesh)


def predict(trainer: Trainer) -> dict[str, np.ndarray]:
    [found] = trainer.predict('samples', trainer.fit().state)
    return found


@pytest.mark.slow
def test_texts_of_an_evaluation(tmp_path: pathlib.Path) -> None:
    """They are what `generate` returns for the trained model, written as text."""
    trainer = make_trainer({'temperature': 0.0}, workdir=tmp_path, **DECODING)
    result = trainer.fit()
    assert result.status == 'finished'
    [found] = trainer.predict('samples', result.state)
    model, variables = trainer.model(result.state).unbind()
    source = Prompts(TEXTS).gather(np.arange(8))
    decoder = with_cache(model.clone(decode=True), variables, 8, 20)
    expected = generate(*decoder, source['tokens'], lengths=source['length'], count=6)
    np.testing.assert_array_equal(found['generated'], expected.tokens)
    np.testing.assert_array_equal(found['prompt'], source['tokens'])
    np.testing.assert_array_equal(found['prompt_length'], source['length'])
    [path] = tmp_path.rglob('samples.txt')
    texts = path.read_text().removesuffix('\n').split('\n--------\n')
    ends = [bytes(row.tolist()).decode(errors='replace') for row in found['generated'][:3]]
    assert texts == [f'{text}▶{end}' for text, end in zip(TEXTS[:3], ends, strict=True)]
    assert 'eval/samples/loss' not in result.metrics


@pytest.mark.slow
def test_drawn_tokens_on_one_and_eight_devices_with_and_without_a_cache() -> None:
    found = [
        predict(make_trainer({**DRAWING, **task}, devices=devices, **options))
        for devices, task, options in [(1, {}, DECODING), (8, {}, DECODING), (1, WITHOUT_CACHE, {})]
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(other[name], value)
    assert len({tuple(row) for row in found[0]['generated']}) == 8


@pytest.mark.slow
def test_two_processes_write_the_texts_of_one(tmp_path: pathlib.Path) -> None:
    """Although the loop ends with the last example of both."""
    (tmp_path / 'samples.py').write_text(
        f'from {__name__} import DECODING, DRAWING, make_config\n\n\n'
        'def get_config():\n    return make_config(DRAWING, **DECODING)\n'
    )
    config = (f'--config={tmp_path}/samples.py',)
    found = []
    for count in (1, 2):
        codes, _, errors = group.finish(group.start(count, tmp_path / str(count), config=config))
        assert codes == [0] * count, errors
        [path] = (tmp_path / str(count)).rglob('samples.txt')
        found.append(path.read_text())
    assert found[0] == found[1] and found[0].count('▶') == 3


@pytest.mark.slow
def test_a_model_of_nnx_generates_without_a_cache() -> None:
    """This one continues with the most probable token after the last."""
    trainer = make_trainer(
        {**WITHOUT_CACHE, 'temperature': 0.0}, network={'target': f'{__name__}:Network'}
    )
    state = trainer.fit().state
    [found] = trainer.predict('samples', state)
    tokens = np.concatenate([found['prompt'][:, :1] * 0, found['generated']], axis=1)
    tokens[:, 0] = [ord(text[-1]) for text in TEXTS]
    expected = np.asarray(trainer.model(state)(tokens))[:, :-1].argmax(-1)
    np.testing.assert_array_equal(found['generated'], expected)


@pytest.mark.slow
def test_a_model_of_nnx_generates_with_a_cache_of_its_own() -> None:
    """Also in half precision, whose results are float32."""
    network = {**TRANSFORMER, 'target': 'trainer.models.transformer_nnx:Transformer'}
    own = {'decoder': dict(ref='trainer.models.decoding:with_own_cache')}
    found = []
    for task in (WITHOUT_CACHE, own):
        trainer = make_trainer({**DRAWING, **task}, network=network)
        found.append(predict(trainer)['generated'])
    np.testing.assert_array_equal(*found)
    precision = dict(compute='bfloat16', output='float32')
    half = make_trainer({**DRAWING, **own}, network=network, precision=precision)
    assert predict(half)['generated'].shape == (8, 6)


@pytest.mark.slow
def test_an_ensemble_generates_without_a_cache() -> None:
    """The tokens of the mean of the probabilities of its members."""
    task = {**WITHOUT_CACHE, 'temperature': 0.0, 'lengths': None, 'prompt': 1}
    trainer = make_trainer(task, ensemble={'size': 2})
    # Larger parameters: the members of a fresh model agree nearly.
    state = trainer.init_state()
    state = state.replace(params=jax.tree.map(lambda x: 5 * x, state.params))
    [found] = trainer.predict('samples', state)
    tokens = np.concatenate([found['prompt'], found['generated']], axis=1)
    members = np.stack([trainer.model(state, member=member)(tokens)[:, :-1] for member in (0, 1)])
    expected = np.asarray(jax.nn.softmax(members)).mean(0).argmax(-1)
    np.testing.assert_array_equal(found['generated'], expected)
    assert (members.mean(0).argmax(-1) != expected).any()


@pytest.mark.slow
def test_a_prompt_is_the_beginning_of_an_example() -> None:
    task = {'prompt': 2, 'temperature': 0.0, 'stop': (*range(256),), 'pad': 7}
    found = predict(make_trainer(task, **DECODING))
    assert found['prompt'].shape == (8, 2)
    assert found['prompt_length'].tolist() == [min(len(text), 2) for text in TEXTS]
    assert found['length'].tolist() == [1] * 8 and (found['generated'][:, 1:] == 7).all()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, r'Continuation: the model has no collection cache\. Set evals\.NAME\.model to'),
    ({}, {'network': {'target': f'{__name__}:Network'}}, r'only a Linen module .*:without_cache'),
    ({'count': 7}, DECODING, r'a prompt of 14 .*count=7 more: 21 tokens, but max_length is 20'),
    ({'count': 9, **WITHOUT_CACHE}, {}, r'count=9 more: 23 tokens, but max_length is 20'),
    ({'top_k': -1}, DECODING, r'top_k: expected 0 for all tokens, or a number > 0, got -1'),
]


@pytest.mark.parametrize(('task', 'options', 'message'), slow_after(1, REFUSED))
def test_what_cannot_generate_is_an_error(
    task: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """Before the first step."""
    with pytest.raises(UserError, match=message):
        make_trainer(task, **options).compile()


def test_a_negative_temperature_is_an_error() -> None:
    with pytest.raises(ValueError, match=r'temperature: expected 0 for .*, got -1\.0'):
        Continuation(generate=generate, temperature=-1.0)
