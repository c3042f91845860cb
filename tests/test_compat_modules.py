# SPDX-License-Identifier: Apache-2.0
"""Private parts of Flax and JAX that models rely on: each test is named after its function.

When one fails with a new version, fix that function of `trainer.compat`, and nothing else.
"""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from trainer import compat

RNG, X = jax.random.key(0), jnp.ones((2, 3))


class Noisy(nn.Module):
    """Draws from its own RNG stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x) + jax.random.normal(self.make_rng('noise'), x.shape)


class Branch(nn.Module):
    """Sows in one of two branches."""

    watch: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def sowing(module: nn.Module, x: jax.Array) -> jax.Array:
            self.watch()
            module.sow('intermediates', 'x', x)
            return x

        self.watch()
        return nn.cond(x.sum() > 0, sowing, lambda module, x: 2 * x, self, x)


@pytest.mark.parametrize('name', ['cond', 'switch', 'while_loop', 'fori_loop'])
@pytest.mark.parametrize('system', [jax.lax, nnx], ids=['jax.lax', 'nnx'])
def test_num_open_calls(system: Any, name: str) -> None:
    """Counts nested calls in a branch or a loop."""
    function, found = getattr(system, name), []

    def body(*args: Any) -> Any:
        found.append(compat.num_open_calls((function,)))
        return args[-1]

    args: dict[str, tuple[Any, ...]] = {
        'cond': (True, body, body, X),
        'switch': (0, [body, body], X),
        'while_loop': (lambda x: x.sum() < 0, body, X),
        'fori_loop': (0, 2, body, X),
    }
    jax.jit(lambda: function(*args[name]))()
    assert found and set(found) == {1}
    assert compat.num_open_calls((function,)) == 0


def test_num_open_calls_of_linen() -> None:
    """The branches of `nn.cond` are traced inside its call, earlier code is not."""
    found: list[int] = []
    model = Branch(lambda: found.append(compat.num_open_calls((nn.cond, nn.switch))))
    model.apply({}, X)
    assert found == [0, 1]


def test_branches_differ() -> None:
    """Branches that create different variables are distinguished from any other TypeError."""
    with pytest.raises(TypeError) as caught:
        Branch(lambda: None).apply({}, X, mutable=['intermediates'])
    assert compat.branches_differ(caught.value, 'intermediates')
    assert not compat.branches_differ(caught.value, 'batch_stats')
    with pytest.raises(TypeError) as caught:
        jax.lax.cond(True, lambda x: x, lambda x: (x, x), X)
    assert not compat.branches_differ(caught.value, 'intermediates')


def test_name_stack() -> None:
    """An equation has the scopes that it was traced in, also in a gradient."""

    def call(x: jax.Array) -> jax.Array:
        with jax.named_scope('model'):
            return jnp.sin(x)

    stacks = [compat.name_stack(e) for e in jax.make_jaxpr(jax.grad(call))(1.0).eqns]
    assert 'jvp(model)' in stacks
    assert 'transpose(jvp(model))' in stacks


def test_current_trace() -> None:
    outer, inner = [], []

    def note(x: Any) -> Any:
        inner.append(compat.current_trace())
        return x

    def run(x: Any) -> Any:
        outer.extend([compat.current_trace(), compat.current_trace()])
        jax.vmap(note)(x)
        jax.grad(lambda x: note(x).sum())(x)
        jax.jit(note)(x)
        return x

    jax.eval_shape(run, X)
    assert outer[0] == outer[1]
    assert len(inner) == 3
    assert outer[0] not in inner


def test_is_axis_bound() -> None:
    """A name is bound only inside the transformation that binds it."""
    assert not compat.is_axis_bound('rows')
    found: list[bool] = []
    jax.vmap(lambda x: found.append(compat.is_axis_bound('rows')), axis_name='rows')(X)
    assert found == [True]


def test_missing_stream() -> None:
    """The missing RNG stream is read from Flax's error."""
    with pytest.raises(errors.InvalidRngError) as caught:
        Noisy().apply({'params': {'Dense_0': nn.Dense(3).init(RNG, X)['params']}}, X)
    assert compat.missing_stream(caught.value) == 'noise'
    with pytest.raises(errors.InvalidRngError) as caught:
        nn.Dense(3).init('seed', X)
    assert compat.missing_stream(caught.value) is None


def test_missing_collection() -> None:
    """The missing collection is read from Flax's error."""
    with pytest.raises(errors.ScopeCollectionNotFound) as caught:
        nn.Dense(3).apply({}, X)
    assert compat.missing_collection(caught.value) == 'params'
    assert compat.missing_collection(ValueError('params')) is None


@pytest.mark.parametrize('given', [['batch_stats', 'intermediates'], nn.DenyList(('cache',)), True])
def test_without_collection(given: Any) -> None:
    """The filter keeps all collections but this one."""

    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow('intermediates', 'x', x)
            return nn.BatchNorm(use_running_average=False)(x)

    variables = Sowing().init(RNG, X)
    for mutable, kept in (
        (given, True),
        (compat.without_collection(given, 'intermediates'), False),
    ):
        _, changed = Sowing().apply(variables, X, mutable=mutable)
        assert ('intermediates' in changed) is kept
        assert 'batch_stats' in changed


def test_fold_in_path() -> None:
    """A submodule by itself draws the same numbers as inside the model."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dropout(0.5, deterministic=False, name='part')(x)

    whole = Outer().apply({}, jnp.ones(64), rngs={'dropout': RNG})
    part = nn.Dropout(0.5, deterministic=False)
    alone = part.apply({}, jnp.ones(64), rngs={'dropout': compat.fold_in_path(RNG, ('part',))})
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize('linen', [True, False], ids=['linen', 'nnx'])
def test_set_attribute(linen: bool) -> None:
    """A field is replaced during a call of its module, although frozen or of another trace."""

    def call(module: Any) -> Any:
        with pytest.raises((errors.SetAttributeFrozenModuleError, errors.TraceContextError)):
            module.epsilon = 1.0
        compat.set_attribute(module, 'epsilon', 0.5)
        return module.epsilon

    if linen:
        assert nn.LayerNorm().apply({}, method=call) == 0.5
    else:
        module = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
        assert jax.jit(lambda: call(module))() == 0.5


def test_is_call_of() -> None:
    """Flax's call of a layer is distinguished from that of a lifted class around it."""
    found: list[bool] = []

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        found.append(compat.is_call_of(context, (nn.BatchNorm, nn.LayerNorm)))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        nn.LayerNorm().init(RNG, X)
        nn.Dense(3).init(RNG, X)
        assert [*found] == [True, False]
        axes = {'params': 0, 'batch_stats': 0}
        lifted = nn.vmap(nn.BatchNorm, variable_axes=axes, split_rngs={'params': True})
        found.clear()
        lifted(use_running_average=True).init(RNG, X[None])
    assert found == [False, True]


def test_is_nowrap_and_is_compact() -> None:
    """Methods are recognized by the attributes that Flax's decorators set."""

    class Marked(nn.Module):
        @nn.nowrap
        def helper(self) -> None: ...

        @nn.compact
        def __call__(self) -> None: ...

        def method(self) -> None: ...

    names = ('helper', '__call__', 'method')
    assert [compat.is_nowrap(vars(Marked)[name]) for name in names] == [True, False, False]
    assert [compat.is_compact(vars(Marked)[name]) for name in names] == [False, True, False]


def test_is_constructed() -> None:
    """False while the fields are set, True from `__post_init__` on."""
    found: list[bool] = []

    class Module(nn.Module):
        width: int = 1

        def __setattr__(self, name: str, value: Any) -> None:
            if name == 'width':
                found.append(compat.is_constructed(self))
            super().__setattr__(name, value)

        def __post_init__(self) -> None:
            super().__post_init__()
            found.append(compat.is_constructed(self))

    Module()
    assert found == [False, True]


def test_objects_under_construction() -> None:
    class Inner(nnx.Module):
        """Fails where it creates its layers."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(2, -1, rngs=rngs)

    class Outer(nnx.Module):
        """Creates the other."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = Inner(rngs)

    with pytest.raises(Exception) as caught:
        Outer(nnx.Rngs(0))
    kinds = [type(owner) for owner in compat.objects_under_construction(caught.value)]
    assert kinds[:3] == [Outer, Inner, nnx.Linear]
    with pytest.raises(TypeError) as caught:
        Outer()
    assert compat.objects_under_construction(caught.value) == []
    assert compat.objects_under_construction(ValueError('no')) == []


def test_run_setup() -> None:
    """The submodules of `setup` exist after it, not before."""

    class Module(nn.Module):
        def setup(self) -> None:
            self.part = nn.Dense(3)

    bound = Module().bind({})
    assert 'part' not in vars(bound)
    compat.run_setup(bound)
    assert 'part' in vars(bound)


class Initial(nnx.Module):
    """Records its subclasses, to which ours must not be added."""

    subclasses: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Initial.subclasses += (cls.__name__,)

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
        self.width = 3

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x)


def test_subclass_and_set_class() -> None:
    """The module has another `__call__`, but the same graph, variables, type checks and copies."""

    def call(self: Any, x: jax.Array) -> jax.Array:
        return 2 * Initial.__call__(self, x)

    kind = compat.make_subclass(Initial, call)
    assert Initial.subclasses == ()
    assert issubclass(kind, Initial) and kind.__qualname__ == Initial.__qualname__
    module = Initial(nnx.Rngs(0))
    before, plain = nnx.state(module), module(X)
    compat.set_class(module, kind)
    np.testing.assert_array_equal(module(X), 2 * plain)
    assert jax.tree.structure(nnx.state(module)) == jax.tree.structure(before)
    again = nnx.merge(*nnx.split(module))
    assert type(again) is kind
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(module, X), module(X))
    compat.set_class(module, Initial)
    np.testing.assert_array_equal(module(X), plain)


def test_linen_module_and_set_linen_module() -> None:
    """A bridge calls the Linen module that was set, with its earlier variables."""
    bridge: Any = nnx.bridge.ToNNX(nn.BatchNorm(use_running_average=False), nnx.Rngs(0))
    bridge = nnx.bridge.lazy_init(bridge, X)
    assert compat.linen_module(bridge).use_running_average is False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        compat.set_linen_module(bridge, compat.linen_module(bridge).clone(use_running_average=True))
    assert compat.linen_module(bridge).use_running_average is True
    np.testing.assert_allclose(bridge(X), X, rtol=1e-4)  # By the initial statistics: 0 and 1.


def test_dimension_names() -> None:
    """Dimension names are found in every form that Flax supports."""
    with nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.ones, ('rows', None))
        module = nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0))
        assert compat.dimension_names(module.kernel) == ('rows', None)
        assert compat.dimension_names(module.bias) is None
        assert compat.dimension_names(nnx.Param(X, out_sharding=('a', 'b'))) == ('a', 'b')


@pytest.mark.slow
def test_allow_sow() -> None:
    """NNX's warnings of `sow` and `perturb` are silent in it, and others are not."""
    module = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def sow() -> None:
        module.sow(nnx.Intermediate, 'x', X)
        module.perturb('y', X)

    with pytest.warns(DeprecationWarning) as found:
        sow()
    assert len(found) == 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with compat.allow_sow():
            sow()
            with pytest.raises(DeprecationWarning, match='another'):
                warnings.warn('another', DeprecationWarning, stacklevel=1)
