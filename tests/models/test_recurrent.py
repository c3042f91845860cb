# SPDX-License-Identifier: Apache-2.0
"""The recurrent sequence-to-sequence model."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.data.addition import decode
from trainer.experiment import load_and_build
from trainer.models.beam_search import beam_search
from trainer.models.generation import generate
from trainer.models.recurrent import Seq2Seq
from trainer.modules.functional import as_functional
from trainer.modules.precision import Precision
from trainer.modules.rng import Keys
from trainer.tasks import Answer, TaskOutput
from trainer.tasks.runner import TaskRunner
from trainer.trainer import Trainer

MODEL = Seq2Seq(vocab_size=12, hidden=16)
DRAW = np.random.default_rng(0)
INPUTS = DRAW.integers(1, 12, (6, 7)).astype('i4')
LENGTHS = np.array([7, 1, 3, 5, 2, 7], 'i4')
TARGETS = DRAW.integers(1, 12, (6, 4)).astype('i4')
BATCH = {'inputs': INPUTS, 'lengths': LENGTHS, 'targets': TARGETS}


@functools.cache
def initial_variables() -> Any:
    """Returns the variables of `MODEL`."""
    return jax.jit(MODEL.init)(jax.random.key(1), INPUTS, LENGTHS, TARGETS)


def greedy(variables: Any, count: int = 4) -> np.ndarray:
    tokens = MODEL.apply(variables, INPUTS, LENGTHS, count, method='greedy')
    return np.array(tokens)


@pytest.mark.slow
def test_padding_is_not_read() -> None:
    """Padding does not change the output in either direction; the lengths matter."""
    logits = MODEL.apply(initial_variables(), INPUTS, LENGTHS, TARGETS)
    assert logits.shape == (6, 4, 12)
    for row, length in enumerate(LENGTHS):
        alone = MODEL.apply(
            initial_variables(), INPUTS[row : row + 1, :length], LENGTHS[row : row + 1],
            TARGETS[row : row + 1],
        )  # fmt: skip
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-5)
    whole = MODEL.apply(initial_variables(), INPUTS, np.full(6, 7), TARGETS)
    different = np.abs(whole - logits).max((1, 2)) > 1e-4
    assert different.tolist() == (LENGTHS < 7).tolist()


@pytest.mark.slow
def test_the_padding_of_an_empty_text_is_not_read() -> None:
    """With length 0 the output does not depend on the padding."""
    lengths = np.array([0, 1, 3, 5, 2, 7], 'i4')
    logits, other = (
        MODEL.apply(initial_variables(), inputs, lengths, TARGETS)
        for inputs in (INPUTS, np.where(lengths[:, None] > 0, INPUTS, (INPUTS + 3) % 12))
    )
    np.testing.assert_array_equal(logits, other)


@pytest.mark.slow
def test_the_encoder_is_bidirectional() -> None:
    """Each direction has its own parameters, and the decoder starts from both."""
    params = initial_variables()['params']
    forward, backward = (params['encoder'][name] for name in ('forward_rnn', 'backward_rnn'))
    assert jax.tree.structure(forward) == jax.tree.structure(backward)
    for name in ('forward_rnn', 'backward_rnn'):
        blank = {**params['encoder'], name: jax.tree.map(jnp.zeros_like, params['encoder'][name])}
        variables = {'params': {**params, 'encoder': blank}}
        one = MODEL.apply(variables, INPUTS, LENGTHS, TARGETS)
        assert np.abs(one - MODEL.apply(initial_variables(), INPUTS, LENGTHS, TARGETS)).max() > 1e-3


@pytest.mark.slow
def test_greedy_decoding_equals_teacher_forcing() -> None:
    """Token by token: equal to a full pass over its own answer for each next token."""
    written = greedy(initial_variables())
    assert len({tuple(row) for row in written}) > 1
    again = np.zeros((6, 4), 'i4')
    for place in range(4):
        logits = MODEL.apply(initial_variables(), INPUTS, LENGTHS, again)
        again[:, place] = logits[:, place].argmax(-1)
    assert np.array_equal(written, again)
    future = again.copy()
    future[:, 2:] = 5  # Later targets are not read.
    logits = MODEL.apply(initial_variables(), INPUTS, LENGTHS, future)
    assert np.array_equal(logits[:, :3].argmax(-1), written[:, :3])


def measure(mode: Any, targets: np.ndarray, module: Seq2Seq = MODEL, **options: Any) -> TaskOutput:
    task, batch = Answer(**options), {**BATCH, 'targets': targets}
    model = as_functional(module, Precision()).bind(initial_variables(), Keys(seed=0, mode=mode))
    return task(model, {name: jnp.asarray(x) for name, x in batch.items()})


@pytest.mark.slow
def test_an_answer_counts_up_to_its_end() -> None:
    """The loss includes the tokens up to the first 0; the rest may be anything."""
    targets = greedy(initial_variables())
    targets[0] = [5, 0, 7, 7]
    other = targets.copy()
    other[0, 2:] = [0, 3]
    logits = MODEL.apply(initial_variables(), INPUTS, LENGTHS, targets)
    each = -jax.nn.log_softmax(logits)[0, [0, 1], [5, 0]]
    for mode in ('train', 'eval'):
        one, two = (measure(mode, x) for x in (targets, other))
        np.testing.assert_allclose(one.loss, two.loss, rtol=1e-6)
        np.testing.assert_allclose(one.loss[0], each.sum(), rtol=1e-5)
        assert one.loss.shape == one.metrics['exact_match'].shape == (6,)
        assert one.metrics['exact_match'].tolist() == [False] + [True] * 5


@pytest.mark.slow
def test_tokens_after_the_end_are_ignored() -> None:
    """The second token is the end; tokens after it do not matter."""
    written = greedy(initial_variables())
    end = int(written[3, 1])
    targets = written.copy()
    targets[3, 2:] = (written[3, 2:] + 1) % 12
    for mode in ('train', 'eval'):
        assert measure(mode, targets, end=end).metrics['exact_match'][3]
        other = (end + 1) % 12 if (end + 1) % 12 not in written[3] else (end + 2) % 12
        assert not measure(mode, targets, end=other).metrics['exact_match'][3]


class Parrot:
    """A model whose logits say token 2, but which decodes 3."""

    training = False

    def __call__(self, inputs: jax.Array, lengths: jax.Array, targets: jax.Array) -> jax.Array:
        return jax.nn.one_hot(jnp.full_like(targets, 2), 12)

    def greedy(self, inputs: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
        return jnp.full((len(inputs), count), 3)


def test_metrics_are_of_the_logits_and_predictions_are_decoded() -> None:
    batch = {**BATCH, 'targets': np.full((6, 4), 2, 'i4')}
    assert Answer()(Parrot(), batch).metrics['exact_match'].all()
    assert Answer().predict(Parrot(), batch)['answer'].tolist() == [[3] * 4] * 6


@pytest.mark.slow
def test_without_teacher_forcing_the_decoder_reads_its_own_tokens() -> None:
    """The logits are those of a pass that is given these tokens, whatever the targets are."""
    written = greedy(initial_variables())
    free = MODEL.clone(teacher_force=False)
    found = jax.jit(free.apply)(initial_variables(), INPUTS, LENGTHS, TARGETS)
    expected = jax.jit(MODEL.apply)(initial_variables(), INPUTS, LENGTHS, written)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    new = jax.eval_shape(free.init, jax.random.key(1), INPUTS, LENGTHS, TARGETS)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, initial_variables())


@pytest.mark.slow
def test_answers_with_and_without_teacher_forcing() -> None:
    """As many are right as a whole; the tokens after a wrong one may differ."""
    written = greedy(initial_variables())
    targets = written.copy()
    targets[:3, 0] = (targets[:3, 0] + 1) % 12
    forced, free = (
        measure('eval', targets, MODEL.clone(teacher_force=value)).metrics
        for value in (True, False)
    )
    for metrics in (forced, free):
        assert metrics['exact_match'].tolist() == [False] * 3 + [True] * 3
    np.testing.assert_allclose(free['accuracy'], [0.75] * 3 + [1.0] * 3)
    assert not np.array_equal(forced['accuracy'], free['accuracy'])


@pytest.mark.slow
def test_generation_continues_the_carry() -> None:
    """`decode` is what `generate` takes; with a beam search, too."""
    variables = initial_variables()
    decode = functools.partial(MODEL.apply, variables, method='decode')
    carry = MODEL.apply(variables, INPUTS, LENGTHS, method='encode')
    start = jnp.zeros((6, 1), jnp.int32)
    tokens, _ = generate(decode, carry, start, count=4)
    np.testing.assert_array_equal(tokens, greedy(variables))
    beams = beam_search(decode, carry, start, count=4, beams=1)
    np.testing.assert_array_equal(beams.tokens[:, 0], tokens)


@pytest.mark.slow
def test_it_learns_to_add(tmp_path: pathlib.Path) -> None:
    """The sequence-to-sequence example: held-out sums of numbers below one hundred."""
    experiment = load_and_build(
        str(ROOT / 'configs' / 'addition.py'), vars__digits=2, train_for='800 steps',
        data__batch_size=64, evals__held_out__data__source__count=200, checkpoint__every='never',
        evals__teacher_forced__data__source__count=200,
    )  # fmt: skip
    trainer = Trainer(experiment, tmp_path)
    result = trainer.fit()
    assert result.metrics['eval/held_out/exact_match'] > 0.5, result.metrics
    assert result.metrics['train/exact_match'] > 0.9
    forced, free = (
        {name: result.metrics[f'eval/{split}/{name}'] for name in ('exact_match', 'accuracy')}
        for split in ('teacher_forced', 'held_out')
    )
    assert forced['exact_match'] == free['exact_match'] and forced['accuracy'] > free['accuracy']
    predicted = [decode(batch['answer']) for batch in trainer.predict('held_out', result.state)]
    assert all(1 <= len(text) <= 3 and text.isdecimal() for texts in predicted for text in texts)


@pytest.mark.slow
def test_dropout() -> None:
    """Dropout is active in training only."""
    model = MODEL.clone(dropout_rate=0.5)
    inputs = (initial_variables(), INPUTS, LENGTHS, TARGETS)
    train = jax.jit(functools.partial(model.apply, train=True))
    dropped = train(*inputs, rngs={'dropout': jax.random.key(0)})
    kept = jax.jit(model.apply)(*inputs)
    assert not np.allclose(dropped, kept)
    np.testing.assert_array_equal(kept, jax.jit(MODEL.apply)(*inputs))


@pytest.mark.slow
def test_dtypes() -> None:
    """The computation has the requested dtype, the parameters keep theirs."""
    model = MODEL.clone(dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), INPUTS, LENGTHS, TARGETS)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert model.apply(variables, INPUTS, LENGTHS, TARGETS).dtype == jnp.bfloat16


def test_a_batch_without_lengths_is_an_error() -> None:
    model = as_functional(MODEL, Precision()).bind(initial_variables(), Keys(seed=0, mode='eval'))
    with pytest.raises(UserError, match=r"asks for batch\['lengths'\]"):
        TaskRunner.from_task(Answer())(model, {'inputs': INPUTS, 'targets': TARGETS})
