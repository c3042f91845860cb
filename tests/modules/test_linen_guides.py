# SPDX-License-Identifier: Apache-2.0
"""The guides' statements about Linen itself, and models that rely on them."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax.core import unfreeze
from flax.core.scope import DenyList

from tests.modules.learning import train_and_check
from trainer.data.sources import ArraySource
from trainer.modules.functional import as_functional
from trainer.modules.precision import Precision
from trainer.modules.rng import Keys

KEY = jax.random.key(0)
X = np.random.default_rng(2).normal(size=(3, 8)).astype('f4')


class Sequences(ArraySource):
    """512 padded sequences of up to 12 numbers; the class is the quadrant of their sum."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        lengths = draw.integers(1, 13, 512).astype('i4')
        x = draw.normal(size=(512, 12, 2)).astype('f4')
        x[np.arange(12) >= lengths[:, None]] = 99.0  # Reading the padding would hide the class.
        real = np.where(np.arange(12)[:, None] < lengths[:, None, None], x, 0.0)
        label = (real.sum(1)[:, 0] > 0) + 2 * (real.sum(1)[:, 1] > 0)
        fields = {'x': x, 'length': lengths, 'label': label.astype('i4')}
        super().__init__(fields)


class Reader(nn.Module):
    """Reads sequences without padding in both directions."""

    cell: str = 'OptimizedLSTMCell'

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        cell = getattr(nn, self.cell)
        both = nn.Bidirectional(nn.RNN(cell(8)), nn.RNN(cell(8)))
        y = both(x, seq_lengths=lengths)
        inside = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
        return nn.Dense(4)((y * inside).sum(1))


def reading(model: Any, batch: Any) -> Any:
    import optax

    logits = model(batch['x'], batch['length'])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return loss, {'accuracy': logits.argmax(-1) == batch['label']}


@pytest.mark.slow
@pytest.mark.parametrize(
    'cell',
    [
        pytest.param('OptimizedLSTMCell', marks=pytest.mark.slow),
        pytest.param('GRUCell', marks=pytest.mark.slow),
        'SimpleCell',
    ],
)
def test_a_bidirectional_rnn_with_lengths(cell: str) -> None:
    """It learns from sequences padded with random values."""
    source = {'target': f'{__name__}:Sequences'}
    data = {'source': source, 'batch_size': 64}
    train_and_check(
        {'target': f'{__name__}:Reader', 'cell': cell}, steps=120,
        task={'ref': f'{__name__}:reading'}, data=data,
        evals={'test': {'data': {'source': source, 'batch_size': 256}, 'every': 'never'}},
    )  # fmt: skip


@pytest.mark.slow
def test_recurrent_layers() -> None:
    """Shapes, lengths, reversal, and cells whose parameters are the same."""
    x = np.random.default_rng(3).normal(size=(10, 50, 32)).astype('f4')
    rnn = nn.RNN(nn.LSTMCell(64))
    variables = rnn.init(KEY, x)
    whole = rnn.apply(variables, x)
    assert whole.shape == (10, 50, 64)
    fast = nn.RNN(nn.OptimizedLSTMCell(64))
    np.testing.assert_allclose(fast.apply(variables, x), whole, atol=1e-5)
    lengths = np.arange(10) + 5
    carry, padded = rnn.apply(variables, x, seq_lengths=lengths, return_carry=True)
    for row, length in enumerate(lengths):
        last, alone = rnn.apply(variables, x[row : row + 1, :length], return_carry=True)
        np.testing.assert_allclose(padded[row, :length], alone[0], atol=1e-5)
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0], atol=1e-5), carry, last
        )
    backwards = rnn.apply(variables, x, reverse=True, keep_order=True)
    np.testing.assert_allclose(backwards[:, ::-1], rnn.apply(variables, x[:, ::-1]), atol=1e-5)
    by_time = rnn.apply(variables, x.swapaxes(0, 1), time_major=True)
    np.testing.assert_allclose(by_time.swapaxes(0, 1), whole, atol=1e-5)
    images = jnp.ones((2, 5, 6, 6, 3))
    convolved = nn.RNN(nn.ConvLSTMCell(4, (3, 3))).init_with_output(KEY, images)[0]
    assert convolved.shape == (2, 5, 6, 6, 4)


def test_dtypes() -> None:
    """A layer follows its inputs and parameters, a run its config."""
    half = X.astype(jnp.bfloat16)
    variables = nn.Dense(4).init(KEY, half)
    assert nn.Dense(4).apply(variables, half).dtype == jnp.float32
    assert nn.Dense(4, dtype=jnp.bfloat16).apply(variables, half).dtype == jnp.bfloat16
    assert variables['params']['kernel'].dtype == jnp.float32
    complex_out = nn.Dense(4).init_with_output(KEY, X.astype('c8'))[0]
    assert complex_out.dtype == jnp.complex64

    def task(model: Any, batch: Any) -> Any:
        return model(batch)[:, 0]

    model = as_functional(nn.Dense(4), Precision(compute='bfloat16', output='bfloat16'))
    params = model.init(task, X, Keys(seed=0, mode='init'))
    assert params['params']['kernel'].dtype == jnp.float32
    assert model.bind(params, Keys(seed=0, mode='train'))(X).dtype == jnp.bfloat16


class BySetup(nn.Module):
    """Submodules created in setup, with a second method."""

    def setup(self) -> None:
        self.encoder = nn.Dense(8)
        self.head = nn.Dense(4)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nn.relu(self.encoder(x)))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.encoder(x)


class ByCompact(nn.Module):
    """The same in a compact method."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name='head')(nn.relu(nn.Dense(8, name='encoder')(x)))


@pytest.mark.slow
def test_setup_and_compact() -> None:
    """Equal names give equal parameters; `apply(method=...)` for another method."""
    one, two = BySetup().init(KEY, X), ByCompact().init(KEY, X)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    np.testing.assert_allclose(BySetup().apply(two, X), ByCompact().apply(two, X), rtol=1e-6)
    assert BySetup().apply(one, X, method=BySetup.encode).shape == (3, 8)
    for name in ('BySetup', 'ByCompact'):
        train_and_check({'target': f'{__name__}:{name}'})


def test_the_module_lifecycle() -> None:
    """Init is an apply without variables; shapes suffice; `mutable` is explicit."""
    model = ByCompact()
    variables = model.init(KEY, X)
    _, same = model.apply({}, X, rngs={'params': KEY}, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, variables, unfreeze(same))
    lazy = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    jax.tree.map(np.testing.assert_array_equal, variables, lazy)
    text = jax.jit(model.init).lower(KEY, X).compile().as_text()
    assert ' dot(' not in text  # No forward pass is computed.
    assert ' dot(' in jax.jit(model.apply).lower(variables, X).compile().as_text()
    assert not hasattr(BySetup(), 'encoder')
    assert BySetup().clone(name='other').name == 'other'
    counter = Counter()
    started = counter.init(KEY, X)
    for mutable in ('counts', ['counts'], True, DenyList('params')):
        _, new = counter.apply(started, X, mutable=mutable)
        assert int(new['counts']['calls']) == 1
    assert counter.apply(started, X, mutable=False).shape == X.shape


class Counter(nn.Module):
    """A variable of another collection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        known = self.has_variable('counts', 'calls')
        calls = self.variable('counts', 'calls', jnp.zeros, (), jnp.int32)
        if known and self.is_mutable_collection('counts'):
            calls.value += 1
        return x

    @nn.nowrap
    def helper(self) -> int:
        return 3


def test_helpers_and_sequences() -> None:
    """Keyword-only fields, tuples and dicts between layers, nowrap methods."""

    class Keyworded(nn.Module, kw_only=True):
        width: int = 4

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(self.width)(x)

    with pytest.raises(TypeError):
        Keyworded(3)
    assert Keyworded(width=2).init_with_output(KEY, X)[0].shape == (3, 2)

    class Heir(Keyworded):  # Its own fields may be given by position again.
        depth: int = 1

    assert (Heir(5).depth, Heir(5).width) == (5, 4)
    seen = []

    def look(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(context.method_name)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(look):
        assert Counter().apply(Counter().init(KEY, X), X).shape == X.shape
        assert Counter().helper() == 3  # Linen does not know of it.
    assert seen == ['__call__', '__call__']

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return nn.Dense(4)(x), nn.Dense(4)(-x)

    class Add(nn.Module):
        def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
            return a + b

    out, variables = nn.Sequential([Two(), Add(), nn.relu]).init_with_output(KEY, X)
    assert out.shape == (3, 4) and set(variables['params']) == {'layers_0'}


class ResNetBlock(nn.Module):
    """Layers by `functools.partial`, with explicit names where they matter."""

    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(8, (3, 3))(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(8, (3, 3))(y))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The guide's example of a network of partials, small."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = x.reshape(len(x), 2, 2, 2)
        x = conv(8, (3, 3), padding=[(1, 1), (1, 1)], name='conv_init')(x)
        x = nn.relu(norm(name='bn_init')(x))
        x = ResNetBlock(conv, norm)(ResNetBlock(conv, norm)(x))
        return nn.Dense(4)(x.mean((1, 2)))


@pytest.mark.slow
def test_layers_by_partial() -> None:
    """Automatic and explicit names, statistics; and it trains."""
    variables = jax.eval_shape(ResNet().init, KEY, X)
    assert set(variables) == {'params', 'batch_stats'}
    names = {'conv_init', 'bn_init', 'ResNetBlock_0', 'ResNetBlock_1', 'Dense_0'}
    assert set(variables['params']) == names
    assert set(variables['params']['ResNetBlock_0']) == {
        'Conv_0', 'Conv_1', 'BatchNorm_0', 'BatchNorm_1',
    }  # fmt: skip
    train_and_check({'target': f'{__name__}:ResNet'})


def test_a_shared_submodule_has_one_set_of_parameters() -> None:
    """An instance that is called twice has one set of parameters."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            dense = nn.Dense(8, name='shared')
            return dense(dense(x))

    assert set(Twice().init(KEY, X)['params']) == {'shared'}


def test_removed_features_are_errors() -> None:
    """No `flax.nn`; a stream without a key is an error that names it."""
    with pytest.raises(ImportError):
        __import__('flax.nn')
    with pytest.raises(errors.InvalidRngError, match='dropout'):
        nn.Dropout(0.5, deterministic=False).apply({}, X)


def test_arguments_of_initializers() -> None:
    """`self.param(name, init, *args)`; no collection without parameters."""

    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.param('scale', nn.initializers.constant(2.0), x.shape[-1:], jnp.float32)

    assert Scale().init(KEY, X)['params']['scale'].tolist() == [2.0] * 8
    assert nn.Dropout(0.5, deterministic=True).init(KEY, X) == {}


@pytest.mark.slow
def test_tied_embeddings_and_groups() -> None:
    """`Embed.attend`, `GroupNorm`; convolutions with no and several batch dimensions."""
    embed = nn.Embed(11, 8)
    variables = embed.init(KEY, jnp.array([1]))
    logits = embed.apply(variables, X, method=embed.attend)
    np.testing.assert_allclose(logits, X @ variables['params']['embedding'].T, rtol=1e-5)
    grouped = nn.GroupNorm(num_groups=2).init_with_output(KEY, X)[0]
    np.testing.assert_allclose(grouped.reshape(3, 2, 4).mean(-1), np.zeros((3, 2)), atol=1e-5)
    conv = nn.Conv(4, (3, 3))
    image = jnp.ones((5, 5, 2))
    variables = conv.init(KEY, image)
    many = conv.apply(variables, jnp.broadcast_to(image, (2, 3, 5, 5, 2)))
    assert many.shape == (2, 3, 5, 5, 4)
    np.testing.assert_allclose(many[1, 2], conv.apply(variables, image), rtol=1e-6)
