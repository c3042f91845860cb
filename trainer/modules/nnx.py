# SPDX-License-Identifier: Apache-2.0
"""NNX modules behind the functional interface, and as the bound model of a task."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import flat_init, foreign, nnx_bridge, nnx_recorder, pmap_axes, train_flags
from trainer.modules.model_view import BoundModel, Calls, Steps
from trainer.modules.nnx_parts import (
    INTERMEDIATES,
    Parts,
    Path,
    Variables,
    mark_arrays,
    merge_variables,
    values,
)
from trainer.modules.pmap_axes import PmapAxes
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.rng import Keys

# Streams of their own in the `rngs` that a module gets; any other name draws from 'default'.
_STREAMS = ('params', 'dropout', 'default')


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
        named: whether what its parts compute carries their names in traces.
        axes: leaves axes of `jax.pmap` out of its normalisation layers.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    precision: Precision = AS_IS
    named: bool = False
    axes: PmapAxes = dataclasses.field(default_factory=PmapAxes, repr=False)

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables.

        Those whose dimensions the module names are in Linen's boxes (`flax.core.meta`).

        Args:
            task: not called, unless a module waits for its first input (`nnx.bridge.ToNNX`).
            batch: arrays with the training batch's shapes.
            keys: the keys of mode 'init'.
        """
        with nnx.use_eager_sharding(False):
            module = self._make_module(keys)
            named = values(module, boxed=True)
            if nnx_bridge.linen_parts(module):
                task(_LazyModel(module, keys, self.precision, self.axes), batch)
                # The first input has determined the shapes of lazy modules.
                self.__dict__['_parts'] = Parts.of(module)
                # The call was for the shapes only, so its changes of variables are discarded.
                named = merge_variables(values(module, boxed=True), named)
        params = named.pop('params', {})
        return {**named, 'params': self.precision.cast_params(params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> NNXModel:
        """Returns the callable that a task gets; `keys.mode` says whether it trains."""
        return NNXModel(
            self._parts,
            variables,
            keys,
            ema=ema,
            precision=self.precision,
            named=self.named,
            axes=self.axes,
        )

    def with_variables(self, variables: Variables) -> nnx.Module:
        """Returns the module with these variables in it, in evaluation mode."""
        model = NNXModel(self._parts, variables, Keys(seed=0, mode='eval'))
        module = model._module(0, model.params)
        self.axes.remove_axes(module)
        return module

    @functools.cached_property
    def _parts(self) -> Parts:
        def split() -> Any:
            return nnx.split(self._make_module(Keys(seed=0, mode='init')))

        with nnx.use_eager_sharding(False):
            # Not `nnx.eval_shape`, which requires a mesh axis for each dimension name.
            return Parts(*jax.eval_shape(split))

    def _make_module(self, keys: Keys) -> nnx.Module:
        rngs = nnx.Rngs(**{name: keys.stream(name) for name in _STREAMS})
        try:
            # By name where it has one: a class may take it by name alone.
            make: Any = self.make
            made = make(rngs=rngs) if foreign.takes_rngs_by_name(make) else make(rngs)
        except Exception as error:
            if (reason := foreign.failure_message(self.make, error)) is None:
                raise
            raise UserError(reason) from error
        if not isinstance(made, nnx.Module):
            raise UserError(foreign.wrong_result_message(self.make, made))
        mark_arrays(made)
        return made


class NNXModel(BoundModel):
    """An NNX module bound to variables: see `BoundModel`."""

    def __init__(
        self,
        parts: Parts,
        variables: Variables,
        keys: Keys,
        *,
        ema: Any = None,
        precision: Precision = AS_IS,
        named: bool = False,
        axes: PmapAxes | None = None,
    ):
        """Binds; nothing runs before a call."""
        collections = {name: value for name, value in variables.items() if name != 'params'}
        super().__init__(variables['params'], Calls(collections), keys, ema, precision)
        self._parts = parts
        self._named = named
        self._axes = axes or PmapAxes()

    def _field(self, name: str) -> Any:
        return _field_value(getattr(self._module(0, self.params), name, None))

    def _module(self, call: int, params: Any) -> nnx.Module:
        """Returns the module of a call, in the mode of this model."""
        variables = {**self.variables, 'params': params}
        with nnx.use_eager_sharding(False):
            module = self._parts.fill(variables, functools.partial(self._random_value, call))
        nnx_bridge.set_training(module, self.training)
        return module

    def _random_value(self, call: int, path: Path, variable: Any) -> jax.Array:
        """Returns the first value of a key or a count: each layer draws what no other one draws."""
        shape = variable.get_value().shape
        if isinstance(variable, nnx.RngCount):
            return jnp.zeros(shape, variable.get_value().dtype)
        key = self._keys.stream(variable.tag)
        for number in (zlib.crc32('/'.join(path).encode()), call):
            key = jax.random.fold_in(key, number)
        return jax.random.split(key, shape) if shape else key

    def _call(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        with self._axes.intercept_calls(), flat_init.allow_flat_names():
            return super()._call(steps, args, kwargs)

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        calls = self._calls
        args, kwargs = self._precision.cast_for_compute((args, kwargs))
        module = self._module(calls.count, self._precision.cast_for_compute(self.params))
        kwargs = self._with_rngs(module, steps, args, kwargs)
        calls.count += 1
        run = functools.partial(_runner(steps, self.training), module, args, kwargs)
        looking: Any = contextlib.nullcontext()
        if calls.recorder is not None:
            looking = nnx_recorder.record_calls(module, calls.recorder)
        elif self._named:
            looking = nnx_recorder.record_calls(module, nnx_recorder.NameScopes())
        with pmap_axes.omit_in_nnx(module), looking, compat.allow_sow():
            if bridges := nnx_bridge.linen_parts(module):
                output = nnx_bridge.run_with_linen(run, bridges, self.training)
            else:
                output = run()
        if calls.recorder is not None:
            nnx_recorder.take_perturbations(module, calls.recorder)
        calls.intermediates = nnx.to_pure_dict(nnx.pop(module, INTERMEDIATES))
        if calls.recorder is not None:
            calls.intermediates = calls.recorder.take_records(calls.intermediates)
        if self.training:
            updates = values(module)
            updates.pop('params', None)
            self._check_structure(updates)
            changed = self._precision.restore_dtypes(updates, calls.collections)
            calls.collections = {**calls.collections, **changed}
        return self._precision.cast_output(output)

    def _with_rngs(self, module: nnx.Module, steps: Steps, args: Any, kwargs: Any) -> Any:
        """Gives `rngs` to a call that must have them; in training also where it has no others."""
        target = functools.reduce(lambda found, step: step(found), steps, module)
        try:
            signature = inspect.signature(target)
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return kwargs  # The call itself says best what is wrong.
        rngs = signature.parameters.get('rngs')
        if rngs is None or 'rngs' in given:
            return kwargs
        if rngs.default is not rngs.empty and (not self.training or _has_rngs(module)):
            return kwargs
        call = self._calls.count
        keys = {name: jax.random.fold_in(self._keys.stream(name), call) for name in _STREAMS}
        return {**kwargs, 'rngs': nnx.Rngs(**keys)}

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

    def __init__(self, module: nnx.Module, keys: Keys, precision: Precision, axes: PmapAxes):
        super().__init__(Parts(None, None), {'params': {}}, keys, precision=precision, axes=axes)
        nnx_bridge.set_training(module, self.training)
        self._lazy = module
        self._store_variables()

    def stop_gradient(self, pattern: str) -> NNXModel:
        return self

    @property
    def ema(self) -> NNXModel:
        return self

    def _field(self, name: str) -> Any:
        return _field_value(getattr(self._lazy, name, None))

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        # The inputs are not cast: parameters created in this call are not cast either.
        kwargs = self._with_rngs(self._lazy, steps, args, kwargs)
        run = _runner(steps, training=False)
        outputs: list[Any] = []

        def init() -> None:
            initial = _Runner(self._lazy)
            nnx.bridge.lazy_init(initial, lambda m: outputs.append(run(m, args, kwargs)))

        bridges = nnx_bridge.linen_parts(self._lazy)
        with pmap_axes.omit_in_nnx(self._lazy):
            nnx_bridge.run_with_linen(init, bridges, training=False)
        self._calls.intermediates = nnx.to_pure_dict(nnx.pop(self._lazy, INTERMEDIATES))
        self._store_variables()
        return self._precision.cast_output(outputs[0])

    def _store_variables(self) -> None:
        variables = values(self._lazy)
        self._params = variables.pop('params', {})
        self._calls.collections = variables


class _Runner(nnx.Module):
    """What `lazy_init` takes: a module that may be called."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, run: Callable[[nnx.Module], None]) -> None:
        run(self.inner)


def _field_value(field: Any) -> Any:
    """Returns what a field holds: the value, where it is a variable that lasts."""
    lasts = isinstance(field, nnx.Variable) and not isinstance(field, INTERMEDIATES)
    return field.get_value() if lasts else field


def _has_rngs(module: nnx.Module) -> bool:
    return bool(jax.tree.leaves(nnx.state(module, nnx.RngState)))


def _runner(steps: Steps, training: bool) -> Callable[..., Any]:
    call = train_flags.method_with_training(steps, training)

    def run(module: nnx.Module, args: Any, kwargs: Any) -> Any:
        with nnx_bridge.pass_training_to_nnx(training):
            return call(module, *args, **kwargs)

    return run
