# SPDX-License-Identifier: Apache-2.0
"""The examples of Klinen's documentation."""

from __future__ import annotations

import copy
import dataclasses
import operator
import pathlib
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import array_types, enp
from flax import errors

from tests.modules.examples import same
from trainer import klinen as knn

X = jnp.linspace(-1.0, 1.0, 128).reshape(2, 64)
RNG, RNG2 = jax.random.split(jax.random.key(0))


class MLP(knn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.width)(x)


class AutoEncoder(knn.Module):
    encoder: knn.Module
    decoder: knn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(x))


class Noisy(knn.Module):
    """The documentation's module with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(64)(x)
        return nn.Dropout(0.5)(x, deterministic=not self.training)


def auto_encoder() -> AutoEncoder:
    return AutoEncoder(encoder=MLP(), decoder=MLP()).init_bind(RNG, X)


def noisy() -> AutoEncoder:
    return AutoEncoder(encoder=Noisy(), decoder=Noisy()).init_bind(RNG, X)


def test_a_model_is_bound_and_called() -> None:
    """Binding returns a copy; models and their submodules are called directly."""
    original = AutoEncoder(encoder=MLP(), decoder=MLP())
    model = original.init_bind(RNG, jnp.zeros((2, 64)))
    assert isinstance(model, AutoEncoder)
    assert isinstance(model.encoder, MLP)
    variables = original.init(RNG, X)
    assert jax.tree.all(jax.tree.map(same, model.variables, variables))
    assert same(model(X), original.apply(variables, X))
    assert same(model.decoder(model.encoder(X)), model(X))
    with pytest.raises(ValueError, match=r'call model = model\.init_bind'):
        original(X)
    with pytest.raises(errors.CallCompactUnboundModuleError, match=r'not bound .* before calling'):
        original(X)
    for read in ('params', 'rngs', 'variables'):
        with pytest.raises(ValueError, match=r'call model = model\.init_bind'):
            getattr(original, read)


class Composed(knn.Module):
    """Methods that need variables through a field, and one that does not."""

    part: nn.Module

    def encode(self, x: jax.Array) -> jax.Array:
        return self.part(x)

    def width(self) -> int:
        return self.part.features  # type: ignore[attr-defined]


class LinenComposed(nn.Module):
    part: nn.Module

    def encode(self, x: jax.Array) -> jax.Array:
        return self.part(x)


class Base(nn.Module):
    def name_of(self) -> str:
        return 'Base'


class Derived(Base):
    def name_of(self) -> str:
        return 'Derived'


class OfBase(knn.Module, Base):
    pass


class OfBoth(OfBase, Derived):
    pass


def test_methods_follow_the_mro() -> None:
    assert [cls.__name__ for cls in OfBoth.__mro__[-8:] if issubclass(cls, Base)][-2:] == [
        'Derived', 'Base',
    ]  # fmt: skip
    assert OfBoth().name_of() == 'Derived'


def test_unbound_methods_raise() -> None:
    """Public methods of all kinds raise; a method that needs no parameters runs."""
    for cls in (Composed, knn.convert(LinenComposed)):
        with pytest.raises(ValueError, match=rf'{cls.__name__} is not bound.*init_bind'):
            cls(nn.Dense(2)).encode(X)
        assert cls(nn.Dense(2)).init_bind(RNG, X, method='encode').encode(X).shape == (2, 2)
    assert Composed(nn.Dense(2)).width() == 2


@pytest.mark.parametrize('method', ['with_rng', 'call_with_updates', 'call_with_intermediates'])
def test_unbound_members_raise(method: str) -> None:
    """The message names the class and says to call `init_bind`."""
    with pytest.raises(ValueError, match=r'AutoEncoder is not bound.*init_bind'):
        getattr(AutoEncoder(MLP(), MLP()), method)(RNG)
    with pytest.raises(ValueError, match=r'AutoEncoder is not bound.*init_bind'):
        _ = AutoEncoder(MLP(), MLP()).variables


class Plain(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.width)(x)


class OfConverted(knn.convert(Plain)):
    """A subclass of a converted class."""


def test_converted_modules_can_be_pickled() -> None:
    """Bound or unbound, as the converted class and not as the original one."""
    for cls in (knn.convert(Plain), OfConverted):
        model = cls(3).init_bind(RNG, X)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
            assert type(again) is type(model)
            assert same(again(X), model(X))
        for module in (pickle.loads(pickle.dumps(cls(3))), copy.deepcopy(cls(3))):
            assert type(module) is cls
            assert same(module.init_bind(RNG, X)(X), model(X))


def test_conversion() -> None:
    """The same key gives the same parameters, with the same names."""
    for converted in (knn.Dense, knn.convert(nn.Dense)):
        model = converted(3).init_bind(RNG, X)
        assert isinstance(model, nn.Dense)
        expected = nn.Dense(3).init(RNG, X)
        assert jax.tree.all(jax.tree.map(same, model.variables, expected))
        assert same(model(X), nn.Dense(3).apply(expected, X))
    assert knn.convert(nn.Dense) is knn.convert(nn.Dense)
    assert knn.convert(knn.Dense) is knn.Dense
    no_class: Any
    for no_class in (nn.Dense(3), int, nn.relu):
        with pytest.raises(TypeError, match=r'expected a flax\.linen module class.*knn\.bind'):
            knn.convert(no_class)
    inside = AutoEncoder(knn.Dense(4), knn.Dense(2)).init_bind(RNG, X)
    assert inside.encoder.features == 4
    assert set(inside.params) == {'encoder', 'decoder'}


def test_init_accepts_a_seed_shapes_and_a_method() -> None:
    model = MLP().init_bind(RNG, X)
    assert same(
        MLP().init_bind(RNG, jax.ShapeDtypeStruct(X.shape, X.dtype)).params['Dense_0']['kernel'],
        model.params['Dense_0']['kernel'],
    )
    seeded, keyed = MLP().init_bind(7, X), MLP().init_bind({'params': jax.random.key(7)}, X)
    assert same(seeded(X), keyed(X))
    assert set(Setup().init_bind(RNG, X, method='encode').params) == {'dense'}


@dataclasses.dataclass
class Spec:
    """An array spec of a library that is not JAX."""

    shape: Any
    dtype: Any


def test_init_accepts_objects_with_shape_and_dtype() -> None:
    kernel = MLP().init_bind(RNG, X).params['Dense_0']['kernel']
    own = Spec((2, 64), np.float64)
    etils = array_types.f32[(2, 64)]
    for spec in (own, etils, enp.ArraySpec(shape=(2, 64), dtype=np.dtype('float32'))):
        assert same(MLP().init_bind(RNG, spec).params['Dense_0']['kernel'], kernel)
    for wrong in (array_types.f32['batch 64'], Spec(3, 'f4'), Spec((2, 64), 'single precision')):
        with pytest.raises(TypeError, match=r'init_bind: .* expected integer sizes and'):
            MLP().init_bind(RNG, wrong)
    key = jax.ShapeDtypeStruct((), RNG.dtype)
    assert not Drawing().init_bind(RNG, key).params


class Drawing(knn.Module):
    """Takes a key."""

    @nn.compact
    def __call__(self, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (3,))


@dataclasses.dataclass
class Wrapper:
    """A key with methods, like Kauldron's."""

    rng: jax.Array


@dataclasses.dataclass
class ArrayLike:
    """An object that JAX converts to an array."""

    value: jax.Array

    def __jax_array__(self) -> jax.Array:
        return self.value


def test_objects_that_wrap_keys() -> None:
    expected = noisy().with_rng(RNG)
    for wrap in (Wrapper, ArrayLike):
        model = AutoEncoder(encoder=Noisy(), decoder=Noisy()).init_bind(wrap(RNG), X)
        assert same(model.with_rng(wrap(RNG))(X), expected(X))
        streams = {'dropout': wrap(RNG2)}
        assert same(model.with_rng(streams)(X), expected.with_rng({'dropout': RNG2})(X))
    with pytest.raises(TypeError, match='got Wrapper'):
        noisy().with_rng(Wrapper('no key'))  # type: ignore[arg-type]


def test_the_rngs_property() -> None:
    """It has the keys by stream; passed to `with_rng`, they give the same numbers."""
    model = noisy()
    assert model.rngs == {}
    assert model.encoder.rngs == {}
    model = model.with_rng(RNG)
    assert 'dropout' in model.rngs
    assert same(model.with_rng(model.rngs)(X), model(X))
    assert same(model.encoder.with_rng(model.encoder.rngs)(X), model.encoder(X))
    jax.tree.map(lambda a, b: same(a, b) or pytest.fail('differs'), model.rngs, model.eval().rngs)
    assert model.with_rng({'dropout': RNG2}).rngs == {'dropout': RNG2}


def test_calls_are_deterministic() -> None:
    """The same bound keys give the same numbers in each call."""
    model = noisy().with_rng(RNG)
    y0, y1 = model(X), model(X)
    assert jnp.allclose(y0, y1)
    assert same(y0, y1)


def test_forms_of_with_rng() -> None:
    """A new key, keys by stream, the next key; a seed is accepted as a key."""
    model = noisy().with_rng(RNG)
    assert not same(model.with_rng(RNG2)(X), model(X))
    assert same(model.with_rng(RNG2).with_rng(RNG)(X), model(X))
    following = model.with_rng()
    assert not same(following(X), model(X))
    assert same(following(X), model.with_rng()(X))
    assert not same(following.with_rng()(X), following(X))
    explicit = model.with_rng({'dropout': RNG})
    assert not same(explicit(X), model(X))  # The one key is folded with the stream's name.
    assert same(explicit(X), noisy().with_rng({'dropout': RNG, 'other': RNG2})(X))
    assert not same(explicit.with_rng()(X), explicit(X))
    for seed in (3, np.int64(3), jnp.int32(3)):
        assert same(model.with_rng(seed)(X), model.with_rng(jax.random.key(3))(X))
    stepped = jax.jit(lambda model, step: model.with_rng(step)(X))(model, 3)
    np.testing.assert_allclose(stepped, model.with_rng(3)(X), rtol=1e-5)
    for wrong in ('3', 0.5, X, {'dropout': [3]}):
        with pytest.raises(TypeError, match='expected a key such as'):
            model.with_rng(wrong)
    with pytest.raises(TypeError, match=r'expected a key .* got an array float32 \(2, 64\)'):
        AutoEncoder(MLP(), MLP()).init_bind(X)
    old = model.with_rng(jax.random.PRNGKey(3))
    assert same(old(X), old(X))
    assert not same(old.with_rng()(X), old(X))
    with pytest.raises(ValueError, match=r'the model has none; call with_rng\(rng\)'):
        noisy().with_rng()


def test_a_missing_key_is_an_error() -> None:
    """The message names the stream and the method to call."""
    with pytest.raises(errors.InvalidRngError, match=r"'dropout'.*model\.with_rng\(rng\)"):
        noisy()(X)
    with pytest.raises(errors.InvalidRngError, match=r"'dropout'.*model\.with_rng\(rng\)"):
        noisy().with_rng({'noise': RNG})(X)
    with pytest.raises(errors.InvalidRngError, match=r"'noise'.*model\.with_rng\(rng\)"):
        Streams().init_bind(RNG, X).with_rng({'dropout': RNG})(X)


class Streams(knn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = knn.Dropout(0.5)(x)
        return x, jax.random.normal(self.make_rng('noise'), x.shape)


def test_streams_of_any_name() -> None:
    """Each stream derives its own numbers from a single key."""
    model = Streams().init_bind(RNG, X).with_rng(RNG)
    dropped, noise = model(X)
    assert not same(dropped, X)
    assert same(noise, model.eval()(X)[1])
    assert not same(noise, model.with_rng(RNG2)(X)[1])
    assert same(noise, jax.jit(lambda model, x: model(x)[1])(model, X))


def test_a_submodule_draws_as_within_the_model() -> None:
    """The same numbers, at any depth."""
    model = noisy().with_rng(RNG)
    assert same(model.decoder(model.encoder(X)), model(X))
    assert not same(model.encoder(X), model.eval().encoder(X))
    deep = AutoEncoder(AutoEncoder(Noisy(), MLP()), Noisy()).init_bind(RNG, X).with_rng(RNG)
    inner = deep.encoder
    assert same(deep.decoder(inner.decoder(inner.encoder(X))), deep(X))
    assert same(deep.encoder.with_rng(RNG2)(X), deep.with_rng(RNG2).encoder(X))


def test_params_at_every_level() -> None:
    """Submodules share the arrays of the model, also after `with_params`."""
    model = auto_encoder()
    assert set(model.params) == {'encoder', 'decoder'}
    assert model.encoder.params['Dense_0']['kernel'] is model.params['encoder']['Dense_0']['kernel']
    twice = model.with_params(jax.tree.map(lambda p: 2 * p, model.params))
    assert same(twice.encoder(X), 2 * model.encoder(X))


def test_a_model_is_a_pytree() -> None:
    """Leaves, paths, `tree.map`; random keys are the last leaf, if there are any."""
    model = auto_encoder()
    leaves = jax.tree.leaves(model)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(model.params), strict=True))
    assert jax.tree.structure(model) == jax.tree.structure(auto_encoder())
    assert jax.tree.structure(model) != jax.tree.structure(model.eval())
    assert len(jax.tree.leaves(model.with_rng(RNG))) == len(leaves) + 1
    assert len(jax.tree.leaves(model.encoder)) == 2
    zeros = jax.tree.map(jnp.zeros_like, model)
    assert isinstance(zeros, AutoEncoder)
    assert same(zeros(X), jnp.zeros((2, 64)))
    path, _ = jax.tree_util.tree_leaves_with_path(model)[0]
    assert jax.tree_util.keystr(path, simple=True, separator='/').startswith('params/decoder')


def test_a_model_is_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """Like any pytree, also by tools that put other objects in place of arrays."""
    model = noisy()
    with ocp.StandardCheckpointer() as checkpointer:
        for name, saved in {'plain': model, 'with_rng': model.with_rng(RNG)}.items():
            checkpointer.save(tmp_path / name, saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / name, saved)
            assert same(restored.with_rng(RNG)(X), model.with_rng(RNG)(X))
    shapes = jax.eval_shape(lambda: model.with_rng(RNG))
    assert not hasattr(shapes, 'tree')
    assert shapes.encoder.params['Dense_0']['kernel'].shape == (64, 64)


def test_vmap_over_models() -> None:
    """Initialized and called under `vmap`, each with its own key."""
    keys = jax.random.split(RNG, 3)
    models = jax.vmap(lambda key: AutoEncoder(Noisy(), Noisy()).init_bind(key, X))(keys)
    found = jax.vmap(lambda model: model(X))(models.with_rng(keys))
    for i, y in enumerate(found):
        model = jax.tree.map(operator.itemgetter(i), models).with_rng(keys[i])
        np.testing.assert_allclose(y, model(X), rtol=1e-4, atol=1e-5)


def test_jit() -> None:
    """The documentation's evaluation step; equal models share one compiled program."""
    traces = []

    @jax.jit
    def eval_step(model: AutoEncoder, x: jax.Array, y: jax.Array) -> jax.Array:
        traces.append(None)
        model = model.eval()
        y_pred = model(x)
        return jnp.mean((y_pred - y) ** 2)

    model = noisy().with_rng(RNG)
    expected = jnp.mean((model.eval()(X) - X) ** 2)
    np.testing.assert_allclose(eval_step(model, X, X), expected, rtol=1e-6)
    eval_step(noisy().with_rng(RNG2), X, X)
    assert len(traces) == 1
    eval_step(model.eval(), X, X)
    assert len(traces) == 2
    out = jax.jit(lambda model: model.with_rng())(model)
    assert same(out(X), model.with_rng()(X))
    born = jax.jit(AutoEncoder(MLP(), MLP()).init_bind)(RNG, X)
    np.testing.assert_allclose(born(X), auto_encoder()(X), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_grad() -> None:
    """The gradient has the structure of the model, and trains it."""

    def loss(model: AutoEncoder, rng: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean((model.with_rng(rng)(x) - x) ** 2)

    model, losses = noisy(), []
    for step in range(20):
        value, grads = jax.jit(jax.value_and_grad(loss))(model, jax.random.fold_in(RNG, step), X)
        assert jax.tree.structure(grads) == jax.tree.structure(model)
        model = jax.tree.map(lambda p, g: p - 0.1 * g, model, grads)
        losses.append(value)
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(grads, AutoEncoder)
    params = jax.grad(lambda p: loss(model.with_params(p), RNG, X))(model.params)
    same_grads = jax.grad(loss)(model, RNG, X).params
    assert jax.tree.all(jax.tree.map(same, params, same_grads))


class Setup(knn.Module):
    """Submodules created in `setup`, with methods and properties."""

    width: int = 3

    def setup(self) -> None:
        self.dense = nn.Dense(self.width)
        self.heads = {'a': MLP(2), 'b': [MLP(1), MLP(5)]}

    def __call__(self, x: jax.Array) -> Any:
        x = self.encode(x)
        return self.heads['a'](x), self.heads['b'][0](x), self.heads['b'][1](x)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.dense(x)

    @property
    def twice(self) -> int:
        return 2 * self.width


@pytest.mark.slow
def test_a_bound_model_in_a_notebook() -> None:
    """repr, name completion, pickling, and Linen's tools."""
    model = Setup().init_bind(RNG, X)
    assert repr(model).startswith('Setup(')
    assert {'dense', 'heads', 'width', 'encode', 'with_rng'} <= set(dir(model))
    again = pickle.loads(pickle.dumps(model))
    assert same(again(X)[0], model(X)[0])
    assert 'Dense' in model.tabulate(RNG, X)
    assert same(model.apply(model.variables, X)[0], model(X)[0])
    assert same(model.init_bind(RNG2, X)(X)[0], Setup().init_bind(RNG2, X)(X)[0])
    for other in (model.clone(width=4), dataclasses.replace(model, width=4)):
        assert other.init_bind(RNG, X).encode(X).shape == (2, 4)
    assert model != Setup().init_bind(RNG, X)
    assert len({model, model.eval()}) == 2
