# SPDX-License-Identifier: Apache-2.0
"""Each optimizer of optax trains, is saved and is sharded, or a message says what to do."""

from __future__ import annotations

import functools
import inspect
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests import pages
from tests.marks import slow_after
from tests.step import tiny
from tests.step.optax_table import ADAM, OTHERS, REFUSED, TRAINS, trainer
from trainer.checkpoint.manager import Checkpoints, Retention
from trainer.config.errors import UserError
from trainer.parallel.mesh import make_mesh
from trainer.step import objective
from trainer.step.objective import Objective
from trainer.step.optimizer import Optimizer
from trainer.step.state import TrainState

MODULES = {'optax': optax, 'optax.contrib': contrib}
ALL = {f'{module}:{name}': node for module, some in TRAINS.items() for name, node in some.items()}
REFUSALS = {
    f'{module}:{name}': case for module, some in REFUSED.items() for name, case in some.items()
}
# Optimizers whose state has parameters, or whose update reads them.
HOLDERS = {
    name: ALL[f'optax{".contrib" if name in TRAINS["optax.contrib"] else ""}:{name}']
    for name in (
        'schedule_free_adamw', 'mechanize', 'sam', 'prodigy', 'dog', 'cocob', 'momo', 'lbfgs',
        'polyak_sgd', 'sophia', 'muon', 'galore', 'adafactor',
    )
}  # fmt: skip


def is_data(value: Any) -> bool:
    """Whether a name is a module, or a class of named tuples, such as a state."""
    return isinstance(value, types.ModuleType) or (
        inspect.isclass(value) and issubclass(value, tuple)
    )


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_is_in_a_table(module: str) -> None:
    """A newer optax shows here: add its names to `optax_table.py` and to the how-to page."""
    public = {name for name in dir(MODULES[module]) if not name.startswith('_')}
    public = {name for name in public if not is_data(getattr(MODULES[module], name))}
    others = {name for names in OTHERS.values() for name in names.split()}
    known = [*TRAINS[module], *REFUSED[module], *(others & public)]
    assert sorted(public - set(known)) == []
    assert sorted(known) == sorted(set(known) & public)
    assert others <= set(dir(optax)) | set(dir(contrib))


def test_the_page_has_every_optimizer() -> None:
    """Once, and those that are errors as such."""
    found: dict[str, str] = {}
    for *cells, how in pages.table('optax:', 'optax.contrib:', 'how'):
        for module, cell in zip(MODULES, cells, strict=True):
            names = [f'{module}:{name}' for name in re.findall(r'`(\w+)`', cell)]
            assert not set(names) & set(found)
            found.update(dict.fromkeys(names, how))
    assert set(found) == {*ALL, *REFUSALS}
    assert {name for name, how in found.items() if how.startswith('error')} == set(REFUSALS)


@functools.cache
def train(name: str) -> tuple[Any, TrainState, TrainState]:
    """Returns the shapes of the state, the state before two steps, and the one after them.

    The steps run one operation at a time: compiling a program for each optimizer takes minutes.
    """
    programs = trainer(ALL[name]).set_up().programs
    batch = {key: jnp.asarray(x) for key, x in tiny.Points().gather(np.arange(8)).items()}
    step = programs._train_step
    first = state = step.init(programs._shapes)
    for _ in range(2):
        state = step.update(state, batch)
    return programs.abstract, first, state


@pytest.mark.parametrize('name', slow_after(3, ALL))
def test_it_trains(name: str) -> None:
    """Its parameters move and are finite; its state keeps its shapes, so it compiles once."""
    abstract, first, state = train(name)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, state.params)
    assert any(jax.tree.leaves(moved))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(abstract.opt_state)
    for x, shape in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(abstract.opt_state), strict=True
    ):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype)


@pytest.mark.slow
def test_every_state_is_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """All of them in one checkpoint, bit for bit."""
    states = {name: train(name)[2].opt_state for name in ALL}
    state = TrainState(step=jnp.int32(2), params={}, opt_state=states, collections={}, metrics=None)
    checkpoints = Checkpoints(tmp_path, Retention())
    checkpoints.save(2, state, {'step': 2})
    checkpoints.wait()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = checkpoints.restore(2, shapes)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), restored, state)))


# Its slots are one vector of all parameters each.
UNSHARDED = ('optax:flatten',)


@pytest.mark.slow
@pytest.mark.parametrize('name', ALL)
def test_what_is_as_large_as_a_parameter_is_sharded(name: str) -> None:
    """With fully sharded parameters, no device holds a whole slot of one."""
    rule = {'target': 'trainer.sharding:FSDP', 'min_bytes': 1}
    data = {'source': tiny.SOURCE, 'batch_size': 32}
    made = trainer(ALL[name], make_mesh({'data': 2, 'fsdp': 4}), sharding=(rule,), data=data)
    state = made.set_up().programs.abstract
    kernel = state.params['dense']['kernel']
    assert not kernel.sharding.is_fully_replicated
    whole = [
        x.shape
        for x in jax.tree.leaves(state.opt_state)
        if x.size >= kernel.size and x.sharding.is_fully_replicated
    ]
    assert bool(whole) == (name in UNSHARDED), whole


@pytest.mark.parametrize('name', REFUSALS)
def test_what_does_not_train_is_answered(name: str) -> None:
    node, message = REFUSALS[name]
    with pytest.raises(UserError, match=message):
        trainer(node).set_up().programs.step.start()


WITH: dict[str, dict[str, Any]] = {
    'a part frozen': {'optimizer': {'freeze': 'Dense_0/.*'}},
    'clipping': {'optimizer': {'clip_norm': 1.0}},
    'groups': {'groups': True},
    'a moving average': {'ema': {'decay': 0.9}},
    'two members': {'ensemble': {'size': 2}},
    'accumulation': {'accumulate': 2},
    'a loss scale': {'precision': {'compute': 'float16', 'loss_scale': 8.0}},
    'half precision': {'precision': {'params': 'bfloat16', 'compute': 'bfloat16'}},
}


# These compute the loss at other parameters.
SEARCHES = ('lbfgs', 'sophia')


@pytest.mark.slow
@pytest.mark.parametrize('name', HOLDERS)
def test_with_other_keys(name: str) -> None:
    """The step is traced with each, and returns a state of the same shapes."""
    for key, options in WITH.items():
        node = {**HOLDERS[name], **options.get('optimizer', {})}
        if 'groups' in options:
            one, two = {**node, 'params': 'Dense_0/.*'}, {**ADAM, 'params': 'Dense_1/.*'}
            node = {'groups': {'one': one, 'two': two}}
        rest = {k: v for k, v in options.items() if k not in ('optimizer', 'groups')}
        model = {'target': 'tests.step.tiny:Net'}
        programs = trainer(node, model=model, **rest).set_up().programs
        batch = {k: jax.ShapeDtypeStruct((32, *x.shape[1:]), x.dtype)
                 for k, x in tiny.Points().gather(np.arange(1)).items()}  # fmt: skip
        step = programs._train_step.update
        if key == 'a loss scale' and name in SEARCHES:
            with pytest.raises(UserError, match='computes the loss at other parameters'):
                jax.eval_shape(step, programs.abstract, batch)
            continue
        found = jax.eval_shape(step, programs.abstract, batch)
        assert jax.tree.structure(found) == jax.tree.structure(programs.abstract), key
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(programs.abstract), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), key


PARAMS = {'a': {'kernel': jnp.arange(6.0).reshape(2, 3) / 5 + 0.1}, 'b': {'bias': jnp.ones(3)}}
FROZEN = {'c': {'kernel': jnp.full((4, 2), 5.0)}}


def distance(params: Any) -> jax.Array:
    """The loss, which does not depend on the frozen parameters."""
    return sum(jnp.sum((x - 0.3) ** 2) for x in (params['a']['kernel'], params['b']['bias']))


def update_thrice(tx: Any, params: Any) -> Any:
    """Returns the parameters after three updates; gradients of frozen parameters are not 0."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    for _ in range(3):
        value, grads = jax.value_and_grad(distance)(params)
        grads = {**grads, **{part: jax.tree.map(jnp.ones_like, x)
                             for part, x in params.items() if part in FROZEN}}  # fmt: skip
        given = Objective(value, distance)
        more = objective.arguments(given, grads, types.SimpleNamespace(opt_state=state))
        updates, state = tx.update(grads, state, params, **more)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.slow
@pytest.mark.parametrize('name', HOLDERS)
def test_a_frozen_part_does_not_count(name: str) -> None:
    """The rest is updated as if it were all there is: norms and distances leave it out."""
    base = trainer(HOLDERS[name]).experiment.optimizer.base
    assert base is not None
    frozen = {**PARAMS, **FROZEN}
    found = update_thrice(Optimizer(base=base, freeze=('c/.*',)).transformation(frozen), frozen)
    np.testing.assert_array_equal(found['c']['kernel'], frozen['c']['kernel'])
    alone = update_thrice(base, PARAMS)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), alone, PARAMS)))
    for part in PARAMS:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            found[part], alone[part],
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lbfgs', 'mechanize'])
def test_sharded_slots_change_nothing(name: str, tmp_path: pathlib.Path) -> None:
    """Compiled, on eight devices, saved and resumed: the parameters of one device."""
    rule = {'target': 'trainer.sharding:FSDP', 'min_bytes': 1}
    options: dict[str, Any] = {'train_for': '4 steps', 'model': {'target': 'tests.step.tiny:Net'}}
    whole = trainer(HOLDERS[name], **options).fit()
    parts = {'optimizer': HOLDERS[name], 'mesh': {'data': 2, 'fsdp': 4}, 'sharding': (rule,)}
    tiny.trainer(tmp_path, evals={}, **options, **parts).fit(max_steps=2)
    resumed = tiny.trainer(tmp_path, evals={}, **options, **parts).fit()
    assert int(resumed.state.step) == int(whole.state.step) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jax.device_get(resumed.state.params), jax.device_get(whole.state.params),
    )  # fmt: skip
