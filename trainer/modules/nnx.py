# SPDX-License-Identifier: Apache-2.0
"""NNX modules as functions of (variables, rngs, mode), and the bound view that a task calls."""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from trainer.config.errors import UserError
from trainer.modules import mode
from trainer.modules.bound import BoundModel, Calls, Steps
from trainer.step.precision import AS_IS, Precision
from trainer.step.rng import Keys

Variables = Mapping[str, Any]
Path = tuple[str, ...]

# What a call leaves behind for whoever asks, and no step keeps.
_INTERMEDIATES = (nnx.Intermediate, nnx.Perturbation)
# The names that Linen gives to collections of the same meaning.
_NAMES = {nnx.Param: 'params', nnx.BatchStat: 'batch_stats', nnx.Cache: 'cache'}


@dataclasses.dataclass(frozen=True, eq=False)
class NNX:
    """An NNX module for the step functions.

    The module is taken apart once: what never changes (its graph), and its variables, which are
    kept as nested dicts by kind and by path, like Linen's: 'params', 'batch_stats', and a name in
    snake case for each other class of variables. The state of random numbers is none of them: every
    call sets it from the keys of its step.

    Attributes:
        make: makes the module; it is traced, so that no parameter is ever made twice.
        precision: the dtypes of its parameters, its computation and its output.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    precision: Precision = AS_IS

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables.

        Those whose dimensions the module names are in Linen's boxes (`flax.core.meta`).

        Args:
            task: not called, unless a module waits for its first input (`nnx.bridge.ToNNX`).
            batch: arrays with the training batch's shapes.
            keys: the keys of mode 'init'.
        """
        with nnx.use_eager_sharding(False):
            module = self._made(keys)
            if _is_bridged(module):
                task(_LazyModel(module, keys, self.precision), batch)
                # What the first input has shaped is known from here on.
                self.__dict__['_parts'] = _Parts.of(module)
        named = _values(module, boxed=True)
        params = named.pop('params', {})
        return {**named, 'params': self.precision.for_params(params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> NNXModel:
        """Returns the callable that a task gets; `keys.mode` says whether it trains."""
        return NNXModel(self._parts, variables, keys, ema=ema, precision=self.precision)

    def for_notebook(self, variables: Variables) -> nnx.Module:
        """Returns the module with these variables in it, in evaluation mode."""
        return self.bind(variables, Keys(seed=0, mode='eval'))._module(0)

    @functools.cached_property
    def _parts(self) -> _Parts:
        with nnx.use_eager_sharding(False):
            return _Parts.of(nnx.eval_shape(lambda: self._made(Keys(seed=0, mode='init'))))

    def _made(self, keys: Keys) -> nnx.Module:
        names = ('params', 'dropout', 'default')
        made = self.make(nnx.Rngs(**{name: keys.stream(name) for name in names}))
        if not isinstance(made, nnx.Module):
            raise UserError(
                f'config.model: expected a module of flax.linen or flax.nnx, got a function that '
                f'returns {type(made).__name__}'
            )
        return made


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A module without the values of its variables.

    Attributes:
        graph: what never changes.
        state: its variables; their values are shapes.
    """

    graph: Any
    state: Any

    @classmethod
    def of(cls, module: nnx.Module) -> _Parts:
        graph, state = nnx.split(module)
        return cls(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state))

    def filled(self, variables: Variables, rng: Callable[[Path, Any], jax.Array]) -> nnx.Module:
        """Returns the module with these variables.

        Args:
            variables: nested dicts by collection.
            rng: makes the value of a variable of random numbers, by its path.
        """
        flat = {name: traverse_util.flatten_dict(dict(tree)) for name, tree in variables.items()}
        filled = []
        for path, variable in nnx.to_flat_state(self.state):
            place = tuple(map(str, path))
            if isinstance(variable, nnx.RngState):
                value = rng(place, variable)
            else:
                value = flat[_collection(variable)][place]
            filled.append((path, variable.replace(value)))
        return nnx.merge(self.graph, nnx.from_flat_state(filled), copy=True)


class NNXModel(BoundModel):
    """An NNX module bound to variables: see `BoundModel`.

    Attributes:
        intermediates: what the last call has left in `nnx.Intermediate`s, by its sown or assigned
            name, as nested dicts.
    """

    def __init__(
        self,
        parts: _Parts,
        variables: Variables,
        keys: Keys,
        *,
        ema: Any = None,
        precision: Precision = AS_IS,
    ):
        """Binds; nothing runs before a call."""
        collections = {name: value for name, value in variables.items() if name != 'params'}
        super().__init__(
            variables['params'], Calls(collections), keys, ema=ema, precision=precision
        )
        self._parts = parts
        self.intermediates: dict[str, Any] = {}

    def _field(self, name: str) -> Any:
        return getattr(self._module(0), name, None)

    def _module(self, call: int) -> nnx.Module:
        """Returns the module of a call, in the mode of this model."""
        variables = {**self.variables, 'params': self._precision.for_compute(self.params)}
        with nnx.use_eager_sharding(False):
            module = self._parts.filled(variables, functools.partial(self._random, call))
        if self.training:
            module.train()
        else:
            module.eval()
        return module

    def _random(self, call: int, path: Path, variable: Any) -> jax.Array:
        """Returns the first value of a key or a count: each layer draws what no other one draws."""
        shape = variable.get_value().shape
        if isinstance(variable, nnx.RngCount):
            return jnp.zeros(shape, variable.get_value().dtype)
        key = self._keys.stream(variable.tag)
        for number in (zlib.crc32('/'.join(path).encode()), call):
            key = jax.random.fold_in(key, number)
        return jax.random.split(key, shape) if shape else key

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        calls = self._calls
        args, kwargs = self._precision.for_compute((args, kwargs))
        module = self._module(calls.count)
        calls.count += 1
        run, sown = _runner(steps, self.training), {}
        if _is_bridged(module):  # A bridge takes what `capture` leaves in it for Linen's variables.
            output = run(module, args, kwargs)
        else:
            output, found = nnx.capture(run, nnx.Intermediate)(module, args, kwargs)
            sown = nnx.to_pure_dict(found)
        self.intermediates = {**nnx.to_pure_dict(nnx.pop(module, _INTERMEDIATES)), **sown}
        if self.training:
            updates = _values(module)
            updates.pop('params', None)
            self._check_structure(updates)
            calls.collections.update(self._precision.like(updates, calls.collections))
        return self._precision.for_output(output)

    def _check_structure(self, updates: Variables) -> None:
        before: Any = jax.tree.structure(self._calls.collections)
        after: Any = jax.tree.structure(dict(updates))
        if before != after:
            raise ValueError(
                f'the call changed the variables of the module from {before} to {after}; the state '
                'must keep its structure, so what a call makes must be an nnx.Intermediate'
            )


class _LazyModel(NNXModel):
    """A model some of whose modules have no parameters before their first input."""

    def __init__(self, module: nnx.Module, keys: Keys, precision: Precision):
        super().__init__(_Parts(None, None), {'params': {}}, keys, precision=precision)
        self._lazy = module

    def _field(self, name: str) -> Any:
        return getattr(self._lazy, name, None)

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._precision.for_compute((args, kwargs))
        run = _runner(steps, training=False)
        outputs: list[Any] = []
        nnx.bridge.lazy_init(_Runner(self._lazy), lambda m: outputs.append(run(m, args, kwargs)))
        nnx.pop(self._lazy, _INTERMEDIATES)
        return self._precision.for_output(outputs[0])


class _Runner(nnx.Module):
    """What `lazy_init` takes: a module that may be called."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, run: Callable[[nnx.Module], None]) -> None:
        run(self.inner)


def _runner(steps: Steps, training: bool) -> Callable[..., Any]:
    call = mode.method(steps, training)

    def run(module: nnx.Module, args: Any, kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    return run


def _values(module: nnx.Module, *, boxed: bool = False) -> dict[str, Any]:
    """Returns the values of a module's variables as nested dicts, by collection."""
    found: dict[str, dict[Path, Any]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, (nnx.RngState, *_INTERMEDIATES)):
            continue
        value = variable.get_value()
        names = variable.get_metadata().get('out_sharding') if boxed else None
        if names is not None:
            value = nn.LogicallyPartitioned(value, tuple(names))
        found.setdefault(_collection(variable), {})[tuple(map(str, path))] = value
    return {name: traverse_util.unflatten_dict(flat) for name, flat in found.items()}


def _collection(variable: Any) -> str:
    kind = type(variable)
    for known, name in _NAMES.items():
        if issubclass(kind, known):
            return name
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', kind.__name__).lower()


def _is_bridged(module: nnx.Module) -> bool:
    """Whether there is a Linen module inside, which waits for its first input."""
    return any(isinstance(node, nnx.bridge.ToNNX) for _, node in nnx.iter_graph(module))
