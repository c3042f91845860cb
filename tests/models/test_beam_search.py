# SPDX-License-Identifier: Apache-2.0
"""Beam search: with one beam it is greedy decoding, with enough it finds the best of all."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.marks import slow_after
from trainer.models.beam_search import beam_search
from trainer.models.decoding import with_cache, without_cache
from trainer.models.generation import generate
from trainer.models.transformer import Transformer

VOCABULARY, COUNT, STOP = 3, 3, 2
PROMPT = np.array([[0, 1, 1], [1, 0, 0]], np.int32)


def transformer(**options: Any) -> Transformer:
    small = dict(vocab_size=VOCABULARY, layers=1, width=8, heads=2, max_length=8)
    return Transformer(**{**small, **options})


@functools.cache
def variables(**options: Any) -> Any:
    """Returns variables that are far from uniform predictions."""
    model = transformer(**options)
    made = nn.meta.unbox(jax.jit(model.init)(jax.random.key(2), PROMPT))
    return jax.tree.map(lambda x: 2 * x, made)


def cached_decoder(batch: int = 2, **options: Any) -> Any:
    return with_cache(transformer(**options, decode=True), variables(**options), batch, 8)


def predict(tokens: np.ndarray) -> np.ndarray:
    """Returns log probabilities (length, vocabulary) of the next token after each of one row."""
    # Later tokens do not matter, so that one program is enough.
    row = np.zeros((1, 8), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(compile_model()(variables(), row)))[0, : len(tokens)]


@functools.cache
def compile_model() -> Any:
    return jax.jit(transformer().apply)


def search_everything(prompt: np.ndarray, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Returns the scores of all sequences that end with the stop token, the best first.

    Those without a stop token follow.
    """
    groups: list[list[tuple[float, tuple[int, ...]]]] = [[], []]
    for length in range(1, COUNT + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if STOP in tokens[:-1] or (tokens[-1] != STOP and length < COUNT):
                continue
            row = np.concatenate([prompt, tokens])
            log_probs = predict(row[:-1])[len(prompt) - 1 :]
            total = log_probs[np.arange(length), tokens].sum()
            score = total / ((5 + length) / 6) ** penalty
            groups[tokens[-1] != STOP].append((float(score), tokens))
    return [item for group in groups for item in sorted(group, reverse=True)]


@pytest.mark.parametrize('penalty', slow_after(1, [0.6, 0.0, 3.0]))
def test_enough_beams_find_the_best_of_all_sequences(penalty: float) -> None:
    """In each example of a batch, with their scores, however long they are."""
    options: dict[str, Any] = dict(count=COUNT, stop=STOP, length_penalty=penalty, pad=-1)
    found = beam_search(*cached_decoder(), PROMPT, beams=27, **options)
    for row, prompt in enumerate(PROMPT):
        expected = search_everything(prompt, penalty)
        assert found.lengths[row].tolist() == [len(x) for _, x in expected] + [0] * 12
        scores = [score for score, _ in expected]
        np.testing.assert_allclose(found.scores[row, :15], scores, rtol=1e-4)
        assert (found.scores[row, 15:] == -np.inf).all()
        tokens = [[*x, *[-1] * (COUNT - len(x))] for _, x in expected]
        np.testing.assert_array_equal(found.tokens[row], tokens + [[-1] * COUNT] * 12)


def reference(prompt: np.ndarray, count: int, beams: int, penalty: float) -> list[Any]:
    """Searches with a few beams, one sequence after the other, in Python."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, count + 1):
        longer = []
        for total, tokens in running:
            scores = predict(np.concatenate([prompt, tokens]).astype(int))[-1]
            longer += [(total + float(s), (*tokens, token)) for token, s in enumerate(scores)]
        longer.sort(reverse=True)
        best = [item for item in longer[:beams] if item[1][-1] == STOP]
        ended += [(total / ((5 + length) / 6) ** penalty, tokens) for total, tokens in best]
        ended = sorted(ended, reverse=True)[:beams]
        running = [item for item in longer if item[1][-1] != STOP][:beams]
        best = max(total for total, _ in running) / ((5 + count) / 6) ** penalty
        if len(ended) == beams and best <= ended[0][0]:
            return ended
    rest = [(total / ((5 + count) / 6) ** penalty, tokens) for total, tokens in running]
    return (ended + rest)[:beams]


@pytest.mark.slow
@pytest.mark.parametrize('beams', [2, 3])
@pytest.mark.parametrize('scan_layers', [False, True])
def test_a_few_beams(beams: int, scan_layers: bool) -> None:
    """As in plain Python, also if the cache has the batch in its second dimension."""
    decoder = cached_decoder()
    if scan_layers:
        stacked = jax.tree.map(lambda x: x[None], variables()['params']['block_0'])
        params = {**variables()['params'], 'blocks': stacked}
        del params['block_0']
        model = transformer(scan_layers=True, decode=True)
        decoder = with_cache(model, {'params': params}, 2, 8)
    found = beam_search(*decoder, PROMPT, count=5, stop=STOP, beams=beams)
    for row, prompt in enumerate(PROMPT):
        expected = reference(prompt, 5, beams, 0.6)
        np.testing.assert_allclose(found.scores[row], [s for s, _ in expected], rtol=1e-4)
        for tokens, length, (_, other) in zip(
            np.asarray(found.tokens[row]), found.lengths[row].tolist(), expected, strict=True
        ):
            assert tuple(tokens[:length].tolist()) == other


@pytest.mark.parametrize('beams', slow_after(1, [2, 1, 4]))
def test_short_sequences_do_not_end_the_search(beams: int) -> None:
    """A probable one is found, although more than K improbable ones end before it."""
    # After the token 1, another 1 with 0.9 and any of 2 to 4 with 0.03; after these, the end.
    probable = np.log([1e-4, 0.9, 0.03, 0.03, 0.03, 1e-4])
    ending = np.log([1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1.0])

    def extend(tokens: jax.Array, cache: Any) -> Any:
        count = cache['count'] + 1
        is_last = (tokens != 1) | (count[:, None] == 6)
        return jnp.where(is_last[..., None], ending, probable), {'count': count}

    cache = {'count': jnp.zeros(2, jnp.int32)}
    prompt = jnp.ones((2, 1), jnp.int32)
    found = beam_search(extend, cache, prompt, count=8, stop=5, beams=beams, batch_dims=0)
    np.testing.assert_array_equal(found.tokens[:, 0], 2 * [[1, 1, 1, 1, 1, 5, 0, 0]])


@pytest.mark.parametrize(
    ('penalty', 'stop'),
    slow_after(1, [(1.0, STOP), (0.0, STOP), (1.0, ()), (0.0, ()), (1.0, (0, 1)), (0.0, (0, 1))]),
)
def test_one_beam_equals_greedy_decoding(penalty: float, stop: Any) -> None:
    lengths = np.array([3, 2])
    options: dict[str, Any] = dict(count=5, lengths=lengths, stop=stop, pad=9)
    found = beam_search(*cached_decoder(), PROMPT, beams=1, length_penalty=penalty, **options)
    greedy = generate(*cached_decoder(), PROMPT, **options)
    np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(found.lengths[:, 0], greedy.lengths)


@pytest.mark.slow
def test_beams_with_and_without_a_cache() -> None:
    """The same, for prompts of different lengths."""
    options: dict[str, Any] = dict(count=5, stop=STOP, beams=3, lengths=np.array([3, 2]))
    found = beam_search(*cached_decoder(), PROMPT, **options)
    apply = functools.partial(transformer().apply, variables())
    slow = beam_search(*without_cache(apply, 2, 8), PROMPT, **options)
    np.testing.assert_array_equal(found.tokens, slow.tokens)
    np.testing.assert_array_equal(found.lengths, slow.lengths)
    np.testing.assert_allclose(found.scores, slow.scores, rtol=1e-4)


def constant_decoder(log_probs: Any) -> Any:
    """Returns `extend` of a model that counts its calls, with the same logits in each, and a cache.

    The cache has the batch in no dimension that can be found.
    """

    def extend(tokens: jax.Array, cache: jax.Array) -> Any:
        logits = jnp.broadcast_to(jnp.asarray(log_probs), (*tokens.shape, len(log_probs)))
        return logits, cache + 1

    return extend, jnp.int32(0)


def test_the_length_penalty_favors_longer_sequences() -> None:
    """By hand: sequences of 0s and then the stop token 1, of probability 1/2 each token."""
    decoder = constant_decoder(np.log([0.5, 0.5]))
    for penalty, lengths in ((0.0, [1, 2, 3]), (8.0, [4, 3, 2])):
        options: dict[str, Any] = dict(count=4, beams=3, stop=1, length_penalty=penalty)
        found = beam_search(*decoder, PROMPT[:1], **options)
        assert found.lengths[0].tolist() == lengths
        expected = [n * np.log(0.5) / ((5 + n) / 6) ** penalty for n in lengths]
        np.testing.assert_allclose(found.scores[0], expected, rtol=1e-5)


def test_the_search_ends_when_no_better_sequence_is_possible() -> None:
    """The model is called once for the prompt, and once for each token that is needed."""
    calls: list[int] = []
    extend, cache = constant_decoder(np.log([0.5, 0.5]))

    def extend_and_count(tokens: jax.Array, cache: jax.Array) -> Any:
        jax.debug.callback(lambda _: calls.append(1), cache)
        return extend(tokens, cache)

    beam_search(extend_and_count, cache, PROMPT, count=1000, beams=3, stop=1, length_penalty=0.0)
    jax.effects_barrier()
    assert len(calls) == 3


@pytest.mark.slow
def test_an_example_does_not_depend_on_the_others() -> None:
    """The search for one continues while another has ended."""

    def extend(tokens: jax.Array, cache: jax.Array) -> Any:
        # The first example ends at once, the second after five tokens.
        stop = jnp.where(cache[:, 0] == 0, 5.0, jnp.where(cache[:, 1] > 4, 5.0, -5.0))
        logits = jnp.stack([0 * stop, 1 + 0 * stop, stop], -1)[:, None]
        return jnp.repeat(logits, tokens.shape[1], 1), cache + jnp.array([0, 1])

    cache = jnp.array([[0, 0], [1, 0]])
    options: dict[str, Any] = dict(count=8, beams=2, stop=STOP, batch_dims=0)
    found = beam_search(extend, cache, PROMPT[:, :1], **options)
    for row in range(2):
        alone = beam_search(extend, cache[row : row + 1], PROMPT[row : row + 1, :1], **options)
        jax.tree.map(lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0]), found, alone)
    assert found.lengths[0].max() < found.lengths[1].min()


@pytest.mark.slow
def test_several_devices() -> None:
    """A batch that is sharded over 8 devices has the same beams."""
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (8, 3), np.int32)
    extend, cache = cached_decoder(8)
    options: dict[str, Any] = dict(count=5, stop=STOP, beams=3, batch_dims=0)
    expected = beam_search(extend, cache, prompt, **options)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P('data'))
    found = beam_search(
        extend, jax.device_put(cache, sharding), jax.device_put(prompt, sharding), **options
    )
    assert len(found.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_the_dimension_of_the_batch() -> None:
    """It is found, or given where two dimensions have the size of the batch."""
    extend, _ = constant_decoder(np.log([0.5, 0.3, 0.2]))

    def extend_any(tokens: jax.Array, cache: Any) -> Any:
        return extend(tokens, jnp.int32(0))[0], cache

    cache = {'plain': jnp.zeros((2, 5)), 'stacked': jnp.zeros((4, 2, 5)), 'count': jnp.zeros(())}
    found = beam_search(extend_any, cache, PROMPT, count=2, beams=3)
    unclear = {**cache, 'stacked': jnp.zeros((2, 2, 5))}
    with pytest.raises(ValueError, match=r"cache\['stacked'\] has the shape \(2, 2, 5\): which"):
        beam_search(extend_any, unclear, PROMPT, count=2, beams=3)
    dims = {'plain': 0, 'stacked': 1, 'count': None}
    again = beam_search(extend_any, unclear, PROMPT, count=2, beams=3, batch_dims=dims)
    np.testing.assert_array_equal(found.tokens, again.tokens)
    dims = {'plain': -2, 'stacked': -2, 'count': None}
    again = beam_search(extend_any, unclear, PROMPT, count=2, beams=3, batch_dims=dims)
    np.testing.assert_array_equal(found.tokens, again.tokens)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"cache\['plain'\] .* dimension {wrong} is not that"):
            changed = {**dims, 'plain': wrong}
            beam_search(extend_any, unclear, PROMPT, count=2, beams=3, batch_dims=changed)


def test_arguments_out_of_range_are_errors() -> None:
    decoder = constant_decoder([0.0, 0.0])
    with pytest.raises(ValueError, match=r'beams: expected a number > 0, got 0'):
        beam_search(*decoder, PROMPT, count=2, beams=0)
    with pytest.raises(ValueError, match=r'expected at least one token in the prompt and to gen'):
        beam_search(*decoder, PROMPT, count=0)
    with pytest.raises(ValueError, match=r'lengths: .* need a cache with an entry `index`'):
        beam_search(*decoder, PROMPT, count=2, lengths=np.array([1, 2]))
