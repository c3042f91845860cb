# SPDX-License-Identifier: Apache-2.0
"""NNX modules behind the functional interface, and as the bound model that a task calls."""

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
from trainer.modules.model_view import BoundModel, Calls, Getters
from trainer.modules.nnx_parts import (
    INTERMEDIATES,
    Path,
    SplitModule,
    Variables,
    mark_arrays,
    merge_variables,
    variable_values,
)
from trainer.modules.pmap_axes import PmapAxes
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.rng import Keys

# The named RNG streams of the `rngs` that a module gets; any other name draws from 'default'.
_STREAMS = ('params', 'dropout', 'default')


@dataclasses.dataclass(frozen=True, eq=False)
class NNX:
    """An NNX module for the step functions.

    The module is split once into its graph, which never changes, and its variables. These are kept
    like Linen's, as nested dicts by collection and path: 'params', 'batch_stats', and the name in
    snake case of any other class of variables. The RNG state is not among them: every call sets it
    from the keys of its step.

    Attributes:
        make: creates the module. For the graph it is only traced: no parameter is computed twice.
        precision: the dtypes of its parameters, its computation and its output.
        named: whether operations carry the names of its submodules in traces.
        axes: omits axes of `jax.pmap` in its normalization layers.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    precision: Precision = AS_IS
    named: bool = False
    axes: PmapAxes = dataclasses.field(default_factory=PmapAxes, repr=False)

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables.

        Variables with dimension names are in Linen's boxes (`flax.core.meta`).

        Args:
            task: only called if a module creates its parameters at its first input, such as
                `nnx.bridge.ToNNX`.
            batch: arrays with the training batch's shapes.
            keys: the keys of mode 'init'.
        """
        # Eager sharding would take dimension names for mesh axes; sharding rules map them later.
        with nnx.use_eager_sharding(False):
            module = self._make_module(keys)
            named = variable_values(module, boxed=True)
            if nnx_bridge.linen_parts(module):
                task(_LazyModel(module, keys, self.precision, self.axes), batch)
                # The first input has determined the shapes of lazy modules. `__dict__`, because the
                # dataclass is frozen; this replaces the value of the cached property below.
                self.__dict__['_split_module'] = SplitModule.from_module(module)
                # The call was for the shapes only: keep new variables, discard updates of old ones.
                named = merge_variables(variable_values(module, boxed=True), named)
        params = named.pop('params', {})
        return {**named, 'params': self.precision.cast_params(params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> NNXModel:
        """Returns the bound model that a task calls; `keys.mode` says whether it trains."""
        return NNXModel(
            self._split_module,
            variables,
            keys,
            ema=ema,
            precision=self.precision,
            named=self.named,
            axes=self.axes,
        )

    def with_variables(self, variables: Variables) -> nnx.Module:
        """Returns the module with these variables, in evaluation mode."""
        model = NNXModel(self._split_module, variables, Keys(seed=0, mode='eval'))
        module = model._module(0, model.params)
        # Outside of a run nothing intercepts the calls, and the axes of `pmap` are still unbound.
        self.axes.remove_axes(module)
        return module

    @functools.cached_property
    def _split_module(self) -> SplitModule:
        def split() -> Any:
            return nnx.split(self._make_module(Keys(seed=0, mode='init')))

        with nnx.use_eager_sharding(False):
            # Not `nnx.eval_shape`, which requires a mesh axis for each dimension name.
            return SplitModule(*jax.eval_shape(split))

    def _make_module(self, keys: Keys) -> nnx.Module:
        rngs = nnx.Rngs(**{name: keys.stream(name) for name in _STREAMS})
        try:
            # By name if possible, because `rngs` may be keyword-only.
            make: Any = self.make
            module = make(rngs=rngs) if foreign.takes_rngs_by_name(make) else make(rngs)
        except Exception as error:
            if (reason := foreign.failure_message(self.make, error)) is None:
                raise
            raise UserError(reason) from error
        if not isinstance(module, nnx.Module):
            raise UserError(foreign.wrong_result_message(self.make, module))
        mark_arrays(module)
        return module


class NNXModel(BoundModel):
    """An NNX module bound to variables: see `BoundModel`."""

    def __init__(
        self,
        split_module: SplitModule,
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
        self._split_module = split_module
        self._named = named
        self._axes = axes or PmapAxes()

    def _field(self, name: str) -> Any:
        return _field_value(getattr(self._module(0, self.params), name, None))

    def _module(self, call: int, params: Any) -> nnx.Module:
        """Returns the module for a call, in training or evaluation mode like this model.

        Args:
            call: number of earlier calls in this step.
            params: the parameters, cast for computation or not.
        """
        variables = {**self.variables, 'params': params}
        with nnx.use_eager_sharding(False):
            module = self._split_module.fill(variables, functools.partial(self._random_value, call))
        nnx_bridge.set_training(module, self.training)
        return module

    def _random_value(self, call: int, path: Path, variable: Any) -> jax.Array:
        """Returns the value of a key or a count at the start of a call."""
        shape = variable.get_value().shape
        # Counts start at zero in each call, because the key has the number of the call.
        if isinstance(variable, nnx.RngCount):
            return jnp.zeros(shape, variable.get_value().dtype)
        key = self._keys.stream(variable.tag)
        # The path, so that no two layers draw the same numbers; the call, so that no two calls do.
        for number in (zlib.crc32('/'.join(path).encode()), call):
            key = jax.random.fold_in(key, number)
        # An array of keys is of layers that `nnx.vmap` has stacked.
        return jax.random.split(key, shape) if shape else key

    def _call(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        with self._axes.intercept_calls(), flat_init.allow_flat_names():
            return super()._call(getters, args, kwargs)

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        calls = self._calls
        args, kwargs = self._precision.cast_for_compute((args, kwargs))
        module = self._module(calls.count, self._precision.cast_for_compute(self.params))
        kwargs = self._with_rngs(module, getters, args, kwargs)
        calls.count += 1
        run = functools.partial(_make_runner(getters, self.training), module, args, kwargs)
        recording: Any = contextlib.nullcontext()
        if calls.recorder is not None:
            recording = nnx_recorder.record_calls(module, calls.recorder)
        elif self._named:
            recording = nnx_recorder.record_calls(module, nnx_recorder.NameScopes())
        # `record_calls` has replaced classes of the module above, so `omit_in_nnx` derives from the
        # recorded ones, and restores those.
        with pmap_axes.omit_in_nnx(module), recording, compat.allow_sow():
            if bridges := nnx_bridge.linen_parts(module):
                output = nnx_bridge.run_with_linen(run, bridges, self.training)
            else:
                output = run()
        if calls.recorder is not None:
            nnx_recorder.take_perturbations(module, calls.recorder)
        # Popped, because what remains in the module becomes its new state.
        calls.intermediates = nnx.to_pure_dict(nnx.pop(module, INTERMEDIATES))
        if calls.recorder is not None:
            calls.intermediates = calls.recorder.take_records(calls.intermediates)
        # In evaluation, other changes are dropped with the module, which is a copy for this call.
        if self.training or calls.changing:
            updates = variable_values(module)
            updates.pop('params', None)
            self._check_structure(updates)
            if not self.training:
                self._check_trace()
                updates = {name: x for name, x in updates.items() if name in calls.changing}
            changed = self._precision.restore_dtypes(updates, calls.collections)
            calls.collections = {**calls.collections, **changed}
        return self._precision.cast_output(output)

    def _with_rngs(self, module: nnx.Module, getters: Getters, args: Any, kwargs: Any) -> Any:
        """Adds `rngs` to the arguments of a call that takes them and was not passed any.

        An optional argument gets them only in training, and only if the module has no RNG streams
        of its own.
        """
        target = functools.reduce(lambda target, getter: getter(target), getters, module)
        try:
            signature = inspect.signature(target)
            arguments = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return kwargs  # The call itself raises the better error.
        rngs = signature.parameters.get('rngs')
        if rngs is None or 'rngs' in arguments:
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
                'must keep its structure, so variables that a call creates must be nnx.Intermediate'
            )


class _LazyModel(NNXModel):
    """A model during initialization, with modules whose parameters depend on their first input."""

    def __init__(self, module: nnx.Module, keys: Keys, precision: Precision, axes: PmapAxes):
        super().__init__(
            SplitModule(None, None), {'params': {}}, keys, precision=precision, axes=axes
        )
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

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        # The inputs are not cast: parameters created in this call are not cast either.
        kwargs = self._with_rngs(self._lazy, getters, args, kwargs)
        run = _make_runner(getters, training=False)
        outputs: list[Any] = []

        def init() -> None:
            # `lazy_init` calls `__call__`, and the task may have called any method.
            root = _LazyRoot(self._lazy)
            nnx.bridge.lazy_init(root, lambda m: outputs.append(run(m, args, kwargs)))

        bridges = nnx_bridge.linen_parts(self._lazy)
        with pmap_axes.omit_in_nnx(self._lazy):
            nnx_bridge.run_with_linen(init, bridges, training=False)
        self._calls.intermediates = nnx.to_pure_dict(nnx.pop(self._lazy, INTERMEDIATES))
        self._store_variables()
        return self._precision.cast_output(outputs[0])

    def _store_variables(self) -> None:
        variables = variable_values(self._lazy)
        self._params = variables.pop('params', {})
        self._calls.collections = variables


class _LazyRoot(nnx.Module):
    """A module for `nnx.bridge.lazy_init` whose call runs a function of another module."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, run: Callable[[nnx.Module], None]) -> None:
        run(self.inner)


def _field_value(field: Any) -> Any:
    """Returns the value of a field that is a variable of the state, or else the field."""
    is_state = isinstance(field, nnx.Variable) and not isinstance(field, INTERMEDIATES)
    return field.get_value() if is_state else field


def _has_rngs(module: nnx.Module) -> bool:
    return bool(jax.tree.leaves(nnx.state(module, nnx.RngState)))


def _make_runner(getters: Getters, training: bool) -> Callable[..., Any]:
    call = train_flags.method_with_training(getters, training)

    def run(module: nnx.Module, args: Any, kwargs: Any) -> Any:
        with nnx_bridge.pass_training_to_nnx(training):
            return call(module, *args, **kwargs)

    return run
