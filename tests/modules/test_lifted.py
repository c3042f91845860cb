# SPDX-License-Identifier: Apache-2.0
"""Lifted transformations of Linen, each in a model that trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import lift
from flax.core import scope as scope_lib

from tests.modules.examples import X as INPUT
from tests.modules.examples import bind
from tests.modules.learning import train_and_check

X = np.random.default_rng(1).normal(size=(4, 8)).astype('f4')
KEY = jax.random.key(0)


class Branches(nn.Module):
    """Three parallel dense layers, with separate or shared parameters."""

    shared: bool = False
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        axis = None if self.shared else 0
        dense = nn.vmap(
            nn.Dense, in_axes=0, out_axes=0, axis_size=3,
            variable_axes={'params': axis}, split_rngs={'params': not self.shared},
        )  # fmt: skip
        x = nn.tanh(dense(8, name='branches')(jnp.stack([x, 2 * x, -x])))
        if self.batch_norm:
            norm = nn.vmap(
                nn.BatchNorm, in_axes=0, out_axes=0,
                variable_axes={'params': 0, 'batch_stats': 0}, split_rngs={'params': True},
            )  # fmt: skip
            x = norm(use_running_average=not train, momentum=0.5, name='norms')(x)
        return nn.Dense(4)(x.mean(0))


@pytest.mark.slow
def test_branches_by_vmap() -> None:
    """Separate parameters have a branch dimension and differ; shared ones have none."""
    one = train_and_check({'target': f'{__name__}:Branches', 'shared': True}).params['branches']
    three = train_and_check({'target': f'{__name__}:Branches'}).params['branches']
    assert one['kernel'].shape == (8, 8)
    assert three['kernel'].shape == (3, 8, 8)
    assert not np.allclose(three['kernel'][0], three['kernel'][1])


@pytest.mark.slow
def test_statistics_of_branches() -> None:
    """Each branch has the statistics of its own inputs."""
    state = train_and_check({'target': f'{__name__}:Branches', 'batch_norm': True})
    means = state.collections['batch_stats']['norms']['mean']
    assert means.shape == (3, 8)
    assert not np.allclose(means[0], means[1], atol=1e-3)


class Residual(nn.Module):
    """One layer of a residual network, as the body of a scan."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        y = nn.Dense(8)(nn.relu(nn.Dense(16)(x)))
        return x + nn.Dropout(self.rate, deterministic=not train)(y), None


class Stack(nn.Module):
    """Four such layers: in a loop, a scan, or a scan with rematerialization."""

    form: str = 'loop'
    length: int = 4
    rate: float = 0.0
    unroll: int = 1
    policy: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer: Any = Residual
        if self.form in ('remat', 'remat_scanned'):
            scanned = self.form == 'remat_scanned'
            layer = nn.remat(
                Residual, policy=self.policy, prevent_cse=not scanned, static_argnums=(2,)
            )
        if self.form in ('scan', 'remat_scanned'):
            scan = nn.scan(
                layer, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                in_axes=nn.broadcast, length=self.length, unroll=self.unroll,
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )  # fmt: skip
            x, _ = scan(self.rate, name='layers')(x, train)
        else:
            for index in range(self.length):
                x, _ = layer(self.rate, name=f'layer_{index}')(x, train)
        return nn.Dense(4, name='head')(x)


def unstack_layers(params: Any, length: int = 4) -> dict[str, Any]:
    """Converts the parameters of the scan to those of the loop."""
    each = {
        f'layer_{index}': jax.tree.map(lambda x, i=index: x[i], params['layers'])
        for index in range(length)
    }
    return {'head': params['head'], **each}


def gradient(model: nn.Module, params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return (model.apply({'params': params}, X) ** 2).mean()

    return jax.value_and_grad(loss)(params)


@pytest.mark.slow
@pytest.mark.parametrize('unroll', [1, 2])
def test_a_scan_equals_the_loop(unroll: int) -> None:
    """Equal outputs and gradients, the parameters stacked; and it trains."""
    model = Stack('scan', unroll=unroll)
    params = model.init(KEY, X)['params']
    assert params['layers']['Dense_0']['kernel'].shape == (4, 16, 8)
    assert not np.allclose(*params['layers']['Dense_0']['kernel'][:2])
    value, grads = gradient(model, params)
    expected, theirs = gradient(Stack('loop'), unstack_layers(params))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        unstack_layers(grads),
        theirs,
    )
    train_and_check({'target': f'{__name__}:Stack', 'form': 'scan', 'rate': 0.1, 'unroll': unroll})


def test_a_scan_is_compiled_once() -> None:
    """With 32 layers instead of four, a scan's program hardly grows, a loop's eightfold."""

    def size(form: str, length: int) -> int:
        model = Stack(form, length=length)
        params = jax.eval_shape(model.init, KEY, X)
        return jax.jit(model.apply).lower(params, X).as_text().count('\n')

    assert size('scan', 32) < 1.2 * size('scan', 4)
    assert size('loop', 32) > 5 * size('loop', 4)
    assert size('scan', 32) < size('loop', 32) / 3


def test_scanned_layers_have_different_dropout_masks() -> None:
    """With `split_rngs` each layer has its own mask; without it all share one."""

    class Masks(nn.Module):
        split: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            def body(layer: nn.Module, carry: jax.Array, _: Any) -> Any:
                return carry, layer(carry)

            scan = nn.scan(
                body, variable_axes={}, split_rngs={'dropout': self.split}, length=3,
                in_axes=nn.broadcast,
            )  # fmt: skip
            return scan(nn.Dropout(0.5, deterministic=False), x, None)[1]

    ones = jnp.ones((1, 64))
    for split, count in ((True, 3), (False, 1)):
        masks = Masks(split).apply({}, ones, rngs={'dropout': KEY})
        assert len({tuple(mask.ravel().tolist()) for mask in np.asarray(masks)}) == count


POLICIES = (None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.dots_saveable)


@pytest.mark.parametrize('policy', POLICIES)
def test_remat_does_not_change_results(policy: Any) -> None:
    """Loss and gradients of `nn.remat`, alone and within a scan."""
    params = Stack('scan').init(KEY, X)['params']
    value, grads = gradient(Stack('scan'), params)
    again, same = gradient(Stack('remat_scanned', policy=policy), params)
    assert float(again) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), same, grads)
    alone, _ = gradient(Stack('remat', policy=policy), unstack_layers(params))
    assert float(alone) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.slow
def test_remat_saves_memory() -> None:
    """Less temporary memory, as the compiler reports; and it trains, with dropout."""

    def temporaries(form: str) -> int:
        model = Stack(form, length=24)
        params = jax.eval_shape(model.init, KEY, jnp.zeros((4096, 8)))['params']

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return (model.apply({'params': params}, x) ** 2).mean()

        lowered = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((4096, 8)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries('remat_scanned') < 0.7 * temporaries('scan')
    train_and_check({'target': f'{__name__}:Stack', 'form': 'remat_scanned', 'rate': 0.1})


class Deep(nn.Module):
    """A hundred layers in two nested scans that save ten activations each."""

    lengths: tuple[int, ...] = (3, 2)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.remat_scan(Shift, lengths=self.lengths)
        return nn.Dense(4)(layer(name='layers')(x))


class Shift(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + 0.1 * nn.tanh(nn.Dense(8)(x))


@pytest.mark.slow
def test_nested_scans() -> None:
    """Parameters have a dimension for each scan; equal to a loop; and it trains."""
    state = train_and_check({'target': f'{__name__}:Deep'})
    assert state.params['layers']['Dense_0']['kernel'].shape == (3, 2, 8, 8)
    x = X
    for place in np.ndindex(3, 2):
        layer = jax.tree.map(lambda p, i=place: p[i], state.params['layers'])
        x = Shift().apply({'params': layer}, x)
    head = state.params['Dense_0']
    found = Deep().apply({'params': state.params}, X)
    np.testing.assert_allclose(found, x @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-5)


def test_nested_scans_save_memory() -> None:
    """Two nested scans of ten layers need less memory than one scan of a hundred."""

    def temporaries(lengths: tuple[int, ...]) -> int:
        model, x = Deep(lengths), jnp.zeros((4096, 8))
        params = jax.eval_shape(model.init, KEY, x)
        assert params['params']['layers']['Dense_0']['kernel'].shape == (*lengths, 8, 8)
        lowered = jax.jit(jax.grad(lambda p, x: model.apply(p, x).sum())).lower(params, x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries((10, 10)) < 0.6 * temporaries((100,))


class Causal(nn.Module):
    """A dense layer whose kernel is made triangular when it is read."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def triangular(variables: Any) -> Any:
            return variables if self.is_initializing() else jax.tree.map(jnp.triu, variables)

        dense = nn.map_variables(nn.Dense, 'params', triangular, init=self.is_initializing())
        return nn.Dense(4)(dense(8, use_bias=False, name='causal')(x))


class Kernel(nn.Module):
    """A dense layer without a bias that uses an existing kernel if there is one."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        if self.has_variable('params', 'kernel'):
            return x @ self.get_variable('params', 'kernel')
        return x @ self.param('kernel', init, (x.shape[-1], self.features))


class Tied(nn.Module):
    """An encoder and a decoder that share a kernel, transposed in one of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        encoder = Kernel(5, name='encoder')
        hidden = nn.tanh(encoder(x))

        def transpose(variables: Any) -> Any:
            return jax.tree.map(jnp.transpose, variables)

        decode = nn.map_variables(lambda module, y: module(y), 'params', transpose, mutable=False)
        return nn.Dense(4)(decode(encoder, hidden))


@pytest.mark.slow
def test_map_variables() -> None:
    """A causal kernel, and tied weights."""
    params = train_and_check({'target': f'{__name__}:Causal'}).params
    (kernel,) = jax.tree.leaves(params['causal'])
    head = params['Dense_0']
    expected = X @ np.triu(kernel) @ head['kernel'] + head['bias']
    assert not np.array_equal(kernel, np.triu(kernel))
    np.testing.assert_allclose(
        Causal().apply({'params': params}, X), expected, rtol=1e-4, atol=1e-5
    )
    params = train_and_check({'target': f'{__name__}:Tied'}).params
    assert set(params) == {'encoder', 'Dense_0'} and set(params['encoder']) == {'kernel'}
    kernel, head = params['encoder']['kernel'], params['Dense_0']
    assert kernel.shape == (8, 5)
    expected = np.tanh(X @ kernel) @ kernel.T @ head['kernel'] + head['bias']
    found = Tied().apply({'params': params}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Derivatives(nn.Module):
    """A module that uses its own derivative with respect to the input."""

    form: str = 'jvp'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(8, name='inner')
        if self.form == 'jvp':
            y, slope = nn.jvp(
                lambda m, x: nn.tanh(m(x)), dense, (x,), (jnp.ones_like(x),),
                variable_tangents={},
            )  # fmt: skip
        elif self.form == 'vjp':
            y, pull = nn.vjp(lambda m, x: nn.tanh(m(x)), dense, x)
            slope = pull(jnp.ones_like(y))[1]
        else:

            def forward(m: nn.Module, x: jax.Array) -> Any:
                y, pull = nn.vjp(lambda m, x: nn.tanh(m(x)), m, x)
                return y, pull

            def backward(pull: Any, cotangent: jax.Array) -> Any:
                params, inputs = pull(cotangent)
                return jax.tree.map(jnp.sign, params), inputs

            sign = nn.custom_vjp(
                lambda m, x: nn.tanh(m(x)), forward_fn=forward, backward_fn=backward
            )
            y, slope = sign(dense, x), x
        return nn.Dense(4)(jnp.concatenate([y, slope], -1))


@pytest.mark.slow
@pytest.mark.parametrize('form', ['jvp', 'vjp', 'custom_vjp'])
def test_derivatives_within_a_module(form: str) -> None:
    """Forward and reverse mode, and a custom gradient; each trains."""
    train_and_check({'target': f'{__name__}:Derivatives', 'form': form})
    params = Derivatives(form).init(KEY, X)['params']
    inner, head = params['inner'], params['Dense_0']
    y = np.tanh(X @ inner['kernel'] + inner['bias'])
    slopes = {
        'jvp': (1 - y**2) * inner['kernel'].sum(0),
        'vjp': (1 - y**2) @ inner['kernel'].T,
        'custom_vjp': X,
    }
    expected = np.concatenate([y, slopes[form]], -1) @ head['kernel'] + head['bias']
    found = Derivatives(form).apply({'params': params}, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_custom_gradient_is_used() -> None:
    """The gradient of the inner parameters consists of signs."""
    model = Derivatives('custom_vjp')
    params = model.init(KEY, X)['params']
    _, grads = gradient(model, params)
    assert set(np.unique(grads['inner']['kernel'])) <= {-1.0, 0.0, 1.0}


class Choices(nn.Module):
    """One of several heads, selected by the first label of the batch; and a loop."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = [nn.Dense(8, name=f'head_{i}') for i in range(3)]
        branches = [lambda m, x, i=i: heads[i](x) for i in range(3)]
        if self.is_initializing():  # Every branch's parameters must be there before.
            for branch in branches:
                branch(self, x)
        index = (x[0, 0] > 0).astype(jnp.int32) + 1
        y = nn.switch(index, branches, self, x)
        y = nn.cond(x[0, 0] > 0, lambda m, y: y * 2, lambda m, y: y, self, y)

        def more(module: nn.Module, carry: Any) -> jax.Array:
            return carry[0] < 3

        def body(module: nn.Module, carry: Any) -> Any:
            return carry[0] + 1, nn.tanh(carry[1])

        _, y = nn.while_loop(more, body, self, (0, jax.lax.stop_gradient(y)), split_rngs={})
        return nn.Dense(4)(jnp.concatenate([x, y], -1))


@pytest.mark.slow
def test_branches_and_loops_by_value() -> None:
    """All branches have parameters from the start; values select the branch."""
    params = train_and_check({'target': f'{__name__}:Choices'}).params
    assert {'head_0', 'head_1', 'head_2'} <= set(params)
    for sign in (1, -1):
        x = X * sign * np.sign(X[0, 0])
        head = params['head_2' if sign > 0 else 'head_1']
        y = (x @ head['kernel'] + head['bias']) * (2 if sign > 0 else 1)
        joined = np.concatenate([x, np.tanh(np.tanh(np.tanh(y)))], -1)
        expected = joined @ params['Dense_0']['kernel'] + params['Dense_0']['bias']
        found = Choices().apply({'params': params}, x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_transformations_of_jax_within_a_module() -> None:
    """They do not know variables and raise; a module passed as an argument works."""

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            norm = nn.BatchNorm(use_running_average=False)
            return jax.jit(lambda x: norm(x))(x)

    variables = Wrong().init(KEY, X)
    # Flax has a JaxTransformError, which today's version never raises: it is JAX that notices.
    with pytest.raises(jax.errors.UnexpectedTracerError):
        Wrong().apply(variables, X, mutable=['batch_stats'])

    class Right(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.jit(lambda module, x: module(x))(nn.Dense(2), x)

    assert Right().init_with_output(KEY, X)[0].shape == (4, 2)


def call(module: nn.Module, x: jax.Array) -> jax.Array:
    return module(x)


def scan_layers(module: nn.Module, x: jax.Array) -> jax.Array:
    scan = nn.scan(
        lambda m, carry, row: (carry, m(row)), variable_broadcast='params',
        split_rngs={'params': False},
    )  # fmt: skip
    return scan(module, 0, x)[1]


def with_custom_gradient(module: nn.Module, x: jax.Array) -> jax.Array:
    lifted = nn.custom_vjp(
        call, forward_fn=lambda m, x: nn.vjp(call, m, x), backward_fn=lambda pull, y: pull(y)
    )
    return lifted(module, x)


def run_loop(module: nn.Module, x: jax.Array) -> jax.Array:
    def body(m: nn.Module, carry: Any) -> Any:
        return carry[0] + 1, m(x)

    y = module(x)  # Its parameters must be there before.
    return nn.while_loop(lambda m, carry: carry[0] < 1, body, module, (0, 0 * y), split_rngs={})[1]


SHARED: Any = {'variable_axes': {'params': None}, 'split_rngs': {'params': False}}
LIFTED: dict[str, Callable[[nn.Module, jax.Array], jax.Array]] = {
    'vmap': lambda m, x: nn.vmap(call, **SHARED)(m, x),
    'scan': scan_layers,
    'remat': lambda m, x: nn.remat(call)(m, x),
    'jit': lambda m, x: nn.jit(call)(m, x),
    'jvp': lambda m, x: nn.jvp(call, m, (x,), (0 * x,), variable_tangents={})[0],
    'vjp': lambda m, x: nn.vjp(call, m, x)[0],
    'custom_vjp': with_custom_gradient,
    'while_loop': run_loop,
    'cond': lambda m, x: nn.cond(x[0, 0] < 9, call, lambda m, x: 0 * m(x), m, x),
    'switch': lambda m, x: nn.switch(1, [lambda m, x: 0 * m(x), call], m, x),
}


@pytest.mark.parametrize('name', list(LIFTED))
def test_transformations_that_can_be_lifted(name: str) -> None:
    """Around a dense layer, each has the layer's output and gradients."""

    class Around(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return LIFTED[name](nn.Dense(3, name='dense'), x)

    model = bind(Around())
    kernel, bias = (model.params['dense'][leaf] for leaf in ('kernel', 'bias'))
    assert kernel.shape == (4, 3)
    np.testing.assert_allclose(model(INPUT), INPUT @ kernel + bias, rtol=1e-5, atol=1e-6)
    if name == 'while_loop':  # It has no backward pass.
        return
    grads = jax.grad(lambda p: Around().apply({'params': p}, INPUT).sum())(model.params)['dense']
    np.testing.assert_allclose(grads['kernel'], jnp.tile(INPUT.sum(0)[:, None], 3), rtol=1e-5)
    np.testing.assert_allclose(grads['bias'], [3.0] * 3, rtol=1e-5)


@pytest.mark.parametrize('name', ['custom_jvp', 'pmap', 'xmap'])
def test_transformations_that_cannot_be_lifted(name: str) -> None:
    """`flax.linen` does not export them."""
    assert not hasattr(nn, name)


def test_collections_go_to_the_first_matching_group() -> None:
    """`lift.pack` with filters, including a deny list."""
    seen: list[Any] = []

    def outer(scope: Any) -> None:
        scope.param('w', lambda key: jnp.ones(()))
        scope.variable('stats', 'mean', lambda: jnp.zeros(()))
        scope.variable('cache', 'index', lambda: jnp.zeros(()))

    variables = scope_lib.init(outer)(KEY)[1]
    filters = ('params', scope_lib.DenyList(('cache',)), True)

    def inner(scopes: Any, repack: Any, groups: Any, rngs: Any) -> Any:
        seen.extend(set(collections) for (collections,) in groups)
        return None, ()

    packed = lift.pack(inner, filters, (), ())
    scope_lib.apply(packed)(variables)
    assert seen == [{'params'}, {'stats'}, {'cache'}]
    assert functools.reduce(set.union, seen) == set(variables)
