# SPDX-License-Identifier: Apache-2.0
"""Generation: the same tokens by any way to compute them, and what is drawn."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.marks import slow_after
from trainer.models import decoding, generation
from trainer.models.decoding import feed_singly, with_cache, without_cache
from trainer.models.generation import generate, keep_probable
from trainer.models.transformer import Transformer

VOCABULARY, LENGTH = 11, 12
PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, (3, 4), np.int32)
LENGTHS = np.array([2, 4, 3], np.int32)
KEY = jax.random.key(0)


def transformer(**options: Any) -> Transformer:
    small = dict(vocab_size=VOCABULARY, layers=1, width=8, heads=2, max_length=LENGTH)
    return Transformer(**{**small, **options})


@functools.cache
def variables(**options: Any) -> Any:
    """Returns variables that are far from uniform predictions."""
    model = transformer(**options)
    made = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), PROMPT))
    return jax.tree.map(lambda x: 3 * x, made)


def cached_decoder(batch: int = 3, length: int = LENGTH, **options: Any) -> Any:
    return with_cache(transformer(**options, decode=True), variables(**options), batch, length)


def full_passes(batch: int = 3, **options: Any) -> Any:
    predict = functools.partial(transformer(**options).apply, variables(**options))
    return without_cache(predict, batch, LENGTH)


def constant_decoder(logits: Any) -> Any:
    """Returns `extend` of a model that always returns the same logits (V,), and its cache."""

    def extend(tokens: jax.Array, cache: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(logits), (*tokens.shape, len(logits))), cache

    return extend, ()


@pytest.mark.parametrize(
    ('scan_layers', 'key'), slow_after(1, [(False, KEY), (True, None), (True, KEY), (False, None)])
)
def test_tokens_with_and_without_a_cache(scan_layers: bool, key: Any) -> None:
    """Greedy or drawn, for prompts of different lengths."""
    options: dict[str, Any] = dict(count=8, lengths=LENGTHS, key=key, top_k=5)
    found = generate(*cached_decoder(scan_layers=scan_layers), PROMPT, **options)
    slow = generate(*full_passes(scan_layers=scan_layers), PROMPT, **options)
    np.testing.assert_array_equal(found.tokens, slow.tokens)
    assert found.lengths.tolist() == [8, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize('key', [KEY, None])
def test_prompts_of_different_lengths_are_continued_as_each_alone(key: Any) -> None:
    """With the random numbers that an example has in the batch."""
    found = generate(*cached_decoder(), PROMPT, count=8, lengths=LENGTHS, key=key)
    for row, length in enumerate(LENGTHS):
        own = None if key is None else jax.random.fold_in(key, row)[None]
        prompt = PROMPT[row : row + 1, :length]
        alone = generate(*cached_decoder(1), prompt, count=8, key=own)
        np.testing.assert_array_equal(alone.tokens[0], found.tokens[row])


@pytest.mark.slow
def test_a_cache_with_tokens_is_continued() -> None:
    """A prompt in two parts, of different lengths, is the same as in one."""
    extend, cache = cached_decoder()
    whole = generate(extend, cache, PROMPT, count=6, lengths=LENGTHS)
    _, cache = extend(jnp.asarray(PROMPT[:, :1]), cache)
    rest = generate(extend, cache, PROMPT[:, 1:], count=6, lengths=LENGTHS - 1)
    np.testing.assert_array_equal(rest.tokens, whole.tokens)


def test_greedy_tokens_are_the_most_probable() -> None:
    tokens, _ = generate(*cached_decoder(), PROMPT, count=8)
    logits = transformer().apply(variables(), np.concatenate([PROMPT, tokens], axis=1))
    np.testing.assert_array_equal(tokens, logits[:, 3:-1].argmax(-1))


def test_stop_tokens_end_an_example() -> None:
    """Tokens before the first stop token are the same, later ones are padding."""
    free = np.asarray(generate(*cached_decoder(), PROMPT, count=8).tokens)
    stop = (int(free[0, 1]), int(free[1, 3]))
    tokens, lengths = generate(*cached_decoder(), PROMPT, count=8, stop=stop, pad=-1)
    for row, found, length in zip(free, np.asarray(tokens), lengths, strict=True):
        ends = np.flatnonzero(np.isin(row, stop))
        assert length == (ends[0] + 1 if len(ends) else 8)
        assert (found[:length] == row[:length]).all() and (found[length:] == -1).all()
    assert lengths[0] <= 2


def test_the_loop_ends_with_the_last_example() -> None:
    """The model is not called again when all examples have stopped."""
    calls: list[int] = []

    def extend(tokens: jax.Array, cache: jax.Array) -> Any:
        jax.debug.callback(lambda _: calls.append(1), cache)
        return jax.nn.one_hot(jnp.full(tokens.shape, cache), 5), cache + 1

    tokens, lengths = generate(extend, jnp.int32(0), PROMPT, count=1000, stop=3)
    jax.effects_barrier()
    assert (tokens[0, :5].tolist(), lengths.tolist()) == ([0, 1, 2, 3, 0], [4, 4, 4])
    assert len(calls) == 4


@pytest.mark.parametrize('is_closure', slow_after(1, [False, True]))
def test_callback_gets_tokens_in_their_order(is_closure: bool) -> None:
    """Those that `generate` returns, one after the other, and which of them count."""
    decoder = full_passes() if is_closure else cached_decoder()
    stop = int(generate(*decoder, PROMPT, count=3).tokens[0, 2])
    options: dict[str, Any] = dict(count=8, key=KEY, stop=(stop,), lengths=LENGTHS)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    found = generate(*decoder, PROMPT, callback=lambda *given: seen.append(given), **options)
    tokens, lengths = generate(*decoder, PROMPT, **options)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(found.lengths, lengths)
    assert len(seen) == max(lengths.tolist())
    np.testing.assert_array_equal(np.stack([x for x, _ in seen], 1), tokens[:, : len(seen)])
    counted = np.stack([is_running for _, is_running in seen], 1)
    np.testing.assert_array_equal(counted, np.arange(len(seen)) < lengths[:, None])


def test_a_callback_within_jit_is_an_error() -> None:
    decoder = cached_decoder()
    with pytest.raises(ValueError, match=r'callback: tokens have no values within jax\.jit'):
        jax.jit(lambda x: generate(*decoder, x, count=2, callback=print))(PROMPT)


def test_within_jit_a_known_cache_and_known_lengths_are_checked() -> None:
    decoder = cached_decoder()
    options: dict[str, Any] = dict(count=3, lengths=LENGTHS)
    found = jax.jit(lambda x: generate(*decoder, x, **options))(PROMPT)
    expected = generate(*decoder, PROMPT, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for change, message in (
        ({'count': 9}, '13 tokens with those'),
        ({'lengths': [1, 0, 9]}, '1 to'),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda x, c=change: generate(*decoder, x, **{**options, **c}))(PROMPT)


@pytest.mark.slow
def test_a_callback_where_only_the_parameters_are_traced() -> None:
    """Those of `extend` as an argument, or of one that closes over them."""
    zeros = jax.tree.map(np.asarray, cached_decoder()[1])

    def run(variables: Any, is_closure: bool) -> Any:
        extend, _ = with_cache(transformer(decode=True), variables, 3, LENGTH)
        call = (lambda *given: extend(*given)) if is_closure else extend
        return generate(call, zeros, PROMPT, count=2, callback=print)

    for is_closure in (False, True):
        with pytest.raises(ValueError, match=r'callback: tokens have no values within jax\.jit'):
            jax.jit(run, static_argnums=1)(variables(), is_closure)


def test_what_a_closure_contains_is_not_a_constant_of_the_program() -> None:
    """Or each call would compile all parameters."""
    weights = jnp.arange(5.0)

    def add(extend: Any, x: jax.Array, options: int) -> jax.Array:
        return extend(x, None)[0] + options

    function = decoding.compile_call(add, lambda x, cache: (x + weights, cache), 2, jnp.ones(5))
    np.testing.assert_array_equal(function(jnp.full(5, 3.0)), [5, 6, 7, 8, 9])
    [cell] = [x.cell_contents for x in function.__closure__ if hasattr(x.cell_contents, 'lower')]
    text = cell.lower([weights], [jnp.ones(5)]).as_text()
    assert 'tensor<5xf32>' in text and 'dense<[' not in text


def reference_of_kept(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Returns which tokens are kept, in numpy, one after the other."""
    order = np.argsort(-logits, kind='stable')
    order = order[: top_k or None]
    probabilities = np.exp(logits[order] - logits.max())
    probabilities /= probabilities.sum()
    count = 1
    while count < len(order) and probabilities[:count].sum() < top_p:
        count += 1
    kept = np.zeros(len(logits), bool)
    kept[order[:count]] = True
    return kept


@pytest.mark.parametrize(
    ('top_k', 'top_p'), [(0, 1.0), (1, 1.0), (3, 1.0), (50, 1.0), (0, 0.5), (0, 1e-6), (4, 0.8)]
)
def test_kept_tokens_are_those_of_numpy(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=(6, VOCABULARY)).astype(np.float32) * 2
    found = keep_probable(jnp.asarray(logits), top_k, top_p)
    expected = np.stack([reference_of_kept(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(np.isfinite(found), expected)
    np.testing.assert_array_equal(np.asarray(found)[expected], logits[expected])


def test_kept_tokens_include_equal_ones() -> None:
    found = keep_probable(jnp.array([1.0, 2.0, 1.0, 0.0]), top_k=2)
    np.testing.assert_array_equal(np.isfinite(found), [True, True, True, False])


@pytest.mark.parametrize(
    ('temperature', 'top_k', 'top_p'), slow_after(1, [(1.5, 3, 0.9), (0.7, 0, 1.0)])
)
def test_distribution_of_drawn_tokens(temperature: float, top_k: int, top_p: float) -> None:
    """Frequencies of 20,000 tokens are the probabilities, within 5 standard deviations."""
    logits = np.array([0.5, 2.0, -1.0, 1.0], np.float32)
    prompt = np.zeros((2000, 1), np.int32)
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, _ = generate(*constant_decoder(logits), prompt, count=10, key=KEY, **options)
    scaled = logits / temperature
    kept = reference_of_kept(scaled, top_k, top_p)
    expected = np.where(kept, np.exp(scaled), 0)
    expected /= expected.sum()
    frequencies = np.bincount(np.asarray(tokens).ravel(), minlength=4) / 20_000
    assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000)).all()
    assert (frequencies[~kept] == 0).all()


@pytest.mark.slow
def test_drawn_tokens_depend_on_the_key() -> None:
    drawn = [
        generate(*cached_decoder(), PROMPT, count=8, key=key).tokens
        for key in jax.random.split(KEY)
    ]
    assert not np.array_equal(*drawn)
    cold = generate(*cached_decoder(), PROMPT, count=8, key=KEY, temperature=1e-6).tokens
    np.testing.assert_array_equal(cold, generate(*cached_decoder(), PROMPT, count=8).tokens)
    old = generate(*cached_decoder(), PROMPT, count=8, key=jax.random.PRNGKey(0)).tokens
    np.testing.assert_array_equal(old, generate(*cached_decoder(), PROMPT, count=8, key=KEY).tokens)


@pytest.mark.slow
def test_equal_models_share_a_program() -> None:
    """It is compiled once, for any parameters and temperatures."""
    program: Any = decoding._compile(generation._generate)
    program.clear_cache()  # Or JAX may drop an old program meanwhile.
    for temperature in (0.5, 1.5):
        generate(*cached_decoder(), PROMPT, count=2, key=KEY, temperature=temperature)
    assert program._cache_size() == 1


@pytest.mark.slow
def test_several_devices() -> None:
    """A batch that is sharded over 8 devices has the same tokens, drawn with a cache."""
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, (8, 4), np.int32)
    options: dict[str, Any] = dict(count=8, key=KEY, lengths=1 + np.arange(8) % 4, stop=3)
    extend, cache = cached_decoder(8)
    expected = generate(extend, cache, prompt, **options)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P('data'))
    found = generate(
        extend, jax.device_put(cache, sharding), jax.device_put(prompt, sharding), **options
    )
    assert len(found.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)


class Elsewhere(nn.Module):
    """A model with the cache of Flax's own attention: one token in a call, one index for all."""

    decode: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, 8)(tokens)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=self.decode)
        return nn.Dense(VOCABULARY)(x + attention(x, mask=mask))


@pytest.mark.slow
def test_a_model_of_flax_s_attention() -> None:
    """Prompts of equal length; for others the error says what the cache lacks."""
    model = Elsewhere()
    variables = jax.tree.map(lambda x: 3 * x, model.init(KEY, PROMPT))
    extend, cache = with_cache(Elsewhere(decode=True), variables, 3, LENGTH)
    found = generate(feed_singly(extend), cache, PROMPT, count=8)
    slow = without_cache(functools.partial(model.apply, variables), 3, LENGTH)
    np.testing.assert_array_equal(found.tokens, generate(*slow, PROMPT, count=8).tokens)
    with pytest.raises(ValueError, match=r'lengths: .* need a cache with an entry `index`'):
        generate(feed_singly(extend), cache, PROMPT, count=8, lengths=LENGTHS)


class Recurrent(nnx.Module):
    """A recurrent model of NNX, whose carry is its cache."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, 8, rngs=rngs)
        self.cell = nnx.GRUCell(8, 8, rngs=rngs)
        self.logits = nnx.Linear(8, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array, carry: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = []
        for position in range(tokens.shape[1]):
            carry, y = self.cell(carry, self.embed(tokens[:, position]))
            found.append(self.logits(y))
        return jnp.stack(found, 1), carry


@pytest.mark.slow
def test_a_model_of_nnx_with_a_carry() -> None:
    """Its own function of tokens and carry is `extend`."""
    model = Recurrent(nnx.Rngs(0))
    zeros = jnp.zeros((3, 8))
    tokens, _ = generate(model, zeros, PROMPT, count=8)
    logits, _ = model(jnp.concatenate([PROMPT, tokens], axis=1), zeros)
    np.testing.assert_array_equal(tokens, logits[:, 3:-1].argmax(-1))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({'count': 0}, r'expected at least one token in the prompt and to generate, got 4 and count=0'),
    ({'prompt': PROMPT[:, :0]}, r'expected at least one token in the prompt'),
    (
        {'prompt': PROMPT[0]},
        r'prompt: expected integers of shape .* got int32 of shape \(4,\)',
    ),
    ({'count': 9}, r'3 prompts, 13 tokens with .* the cache is for batch=3, length=12'),
    ({'prompt': PROMPT[:2]}, r'2 prompts, 6 tokens with .* the cache is for batch=3, length=12'),
    (
        {'key': jax.random.split(KEY)},
        r'key: expected one, or one for each of 3 prompts, got \(2,\)',
    ),
    ({'lengths': [1, 2]}, r'lengths: expected shape \(3,\), got \(2,\)'),
    ({'lengths': [0, 2, 4]}, r'lengths: expected numbers from 1 to 4, got \[0, 2, 4\]'),
    ({'lengths': [1, 2, 5]}, r'lengths: expected numbers from 1 to 4, got \[1, 2, 5\]'),
    ({'temperature': 0}, r'temperature: expected a number > 0, got 0; for the most probable'),
    ({'temperature': jnp.zeros(())}, r'temperature: expected a number > 0'),
    ({'prompt': PROMPT.astype('f4')}, r'prompt: expected integers of shape .* got float32'),
    ({'temperature': np.ones(2)}, r'temperature: expected one number, got shape \(2,\)'),
    ({'temperature': float('nan')}, r'temperature: expected a number > 0'),
    ({'top_k': -1}, r'top_k: expected 0 for all tokens, or a number > 0, got -1'),
    ({'top_p': 0.0}, r'top_p: expected a probability > 0, at most 1, got 0\.0'),
    ({'top_p': 90}, r'top_p: expected a probability > 0, at most 1, got 90'),
]


@pytest.mark.parametrize(('options', 'message'), REFUSED)
def test_arguments_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    arguments = {'prompt': PROMPT, 'count': 2, 'key': KEY, **options}
    with pytest.raises(ValueError, match=message):
        generate(*cached_decoder(), **arguments)


def test_more_tokens_than_fit_into_a_cache_are_an_error() -> None:
    """Also without a cache, one token in a call, and in a cache that has some already."""
    extend, cache = cached_decoder()
    for way in (full_passes(), (feed_singly(extend), cache)):
        with pytest.raises(ValueError, match=r'3 prompts, 13 tokens with .* length=12'):
            generate(*way, PROMPT, count=9)
    _, used = extend(jnp.asarray(PROMPT), cache)
    with pytest.raises(ValueError, match=r'3 prompts, 13 tokens with those in the cache'):
        generate(extend, used, PROMPT, count=5)


def test_prompts_are_padded_with_any_number() -> None:
    """The embedding of one that is no token is NaN."""
    is_padding = np.arange(4) >= LENGTHS[:, None]
    options: dict[str, Any] = dict(count=3, lengths=LENGTHS)
    one, other = (
        generate(*cached_decoder(), np.where(is_padding, x, PROMPT), **options).tokens
        for x in (0, 99)
    )
    np.testing.assert_array_equal(one, other)


def test_prompts_of_bytes_and_stop_tokens_of_numpy() -> None:
    """Generated tokens are int32, because they might not fit into a byte."""
    logits = np.zeros(400).tolist()
    logits[300] = 9.0
    stop: Any = np.int64(300)
    prompt = np.frombuffer(b'ab', np.uint8)[None]
    found = generate(*constant_decoder(logits), prompt, count=3, stop=stop)
    assert found.tokens.tolist() == [[300, 0, 0]] and found.lengths.tolist() == [1]


def test_variables_with_a_cache_of_another_batch() -> None:
    """As `init` of the form that decodes returns them."""
    extend, cache = cached_decoder()
    made = {**variables(), 'cache': cached_decoder(batch=1, length=4)[1]}
    again = with_cache(transformer(decode=True), made, 3, LENGTH)
    found = generate(*again, PROMPT, count=3).tokens
    np.testing.assert_array_equal(found, generate(extend, cache, PROMPT, count=3).tokens)


def test_models_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r'13 tokens, but max_length is 12'):
        cached_decoder(length=13)
    with pytest.raises(ValueError, match=r'Transformer creates no .* model\.clone\(decode=True\)'):
        with_cache(transformer(), variables(), 3, LENGTH)


class Counter(nn.Module):
    """Predicts how often it was called, from a count that begins with 3."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        calls = self.variable('cache', 'calls', jnp.full, (len(tokens),), 3)
        count = calls.value[:, None] + jnp.arange(tokens.shape[1])
        if not self.is_initializing():
            calls.value = calls.value + tokens.shape[1]
        return jax.nn.one_hot(count, 20)


def test_a_cache_begins_with_the_values_that_the_model_gives_it() -> None:
    found = generate(*with_cache(Counter(), {}, 2, 9), PROMPT[:2], count=5)
    assert found.tokens.tolist() == [[6, 7, 8, 9, 10]] * 2


def test_packed_sequences_are_not_decoded() -> None:
    extra = {'positions': np.arange(4)[None], 'segments': np.ones((3, 4), np.int32)}
    for name, value in extra.items():
        with pytest.raises(ValueError, match='segments, positions: not supported with decode=True'):
            model = transformer(decode=True)
            jax.eval_shape(lambda x, m=model, n=name: m.init(KEY, PROMPT, **{n: x}), value)
