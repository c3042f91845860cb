# SPDX-License-Identifier: Apache-2.0
"""Linen modules behind the functional interface, and as the bound model that a task calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors, traverse_util
from flax.core import meta

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import adapters, flat_init, nnx_bridge, reuse, seen, train_flags
from trainer.modules.model_view import BoundModel, Calls, Getters
from trainer.modules.pmap_axes import LINEN_NORMS, PmapAxes
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.recorder import INTERMEDIATES, PERTURBATIONS
from trainer.modules.rng import Keys
from trainer.modules.rng_streams import Streams

Variables = Mapping[str, Any]

# Active dropout in evaluation is always a mistake: without a key, Flax raises an error for it.
_TRAIN_ONLY_STREAMS = frozenset({'dropout'})


@dataclasses.dataclass(frozen=True)
class Linen:
    """A Linen module for the step functions.

    Attributes:
        module: an unbound Linen module.
        precision: the dtypes of its parameters, its computation and its output.
        pmap_axes: omits axes of `jax.pmap` in its normalization layers.
        modes: the module with its training flags set, for False and for True.
    """

    module: nn.Module
    precision: Precision = AS_IS
    pmap_axes: PmapAxes = dataclasses.field(default_factory=PmapAxes, compare=False, repr=False)
    modes: Mapping[bool, nn.Module] = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Once, not in each call: setting the flags walks over all fields of all submodules.
        modes = {
            training: train_flags.set_fields(self.module, training) for training in (False, True)
        }
        object.__setattr__(self, 'modes', types.MappingProxyType(modes))

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables of everything that `task` calls on this batch.

        Variables with dimension names are still in their boxes (`flax.core.meta`).

        Args:
            task: called as `task(model, batch)`, in evaluation mode: initialization needs no
                dropout and does not update batch statistics.
            batch: arrays with the training batch's shapes; the values do not matter.
            keys: the keys of mode 'init'.
        """
        bound = _new_model(self, keys)
        task(bound, batch)
        return {**bound.variables, 'params': self.precision.cast_params(bound.params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> LinenModel:
        """Returns the bound model that a task calls; `keys.mode` says whether it trains."""
        calls = Calls({name: value for name, value in variables.items() if name != 'params'})
        # 'default' is for NNX modules within: without it they get a constant key.
        streams = Streams({'default', 'dropout'})
        if keys.mode != 'train':
            streams = Streams({'default'}, _TRAIN_ONLY_STREAMS)
        return LinenModel(
            variables['params'], calls, keys, ema, self.precision, _linen=self, _streams=streams
        )


@dataclasses.dataclass(eq=False, repr=False)
class LinenModel(BoundModel):
    """A Linen module bound to variables: see `BoundModel`."""

    _linen: Linen = dataclasses.field(kw_only=True)
    _streams: Streams = dataclasses.field(kw_only=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's `__call__` and returns its output."""
        is_recorded = seen.current.get() is not None or reuse.current.get() is not None
        if is_recorded or self._precision.compute is not None:
            return super().__call__(*args, **kwargs)
        return self._apply((), args, kwargs)  # The common case: nothing to record or to cast.

    def fresh_collections(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the collections that initialization with these inputs of the model creates."""
        return _new_model(self._linen, self._keys).fresh_collections(*args, **kwargs)

    def _field(self, name: str) -> Any:
        module = self._linen.modes[self.training]
        return getattr(module, name) if name in train_flags.fields(module) else None

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        calls, recorder, precision = self._calls, self._calls.recorder, self._precision
        training = self._keys.mode == 'train'
        params = self._params
        if precision.compute is not None:
            args, kwargs = precision.cast_for_compute((args, kwargs))
            params = precision.cast_for_compute(params)
        variables = {'params': params, **calls.collections}
        # Unused intermediates cost nothing: the compiler removes them.
        mutable = {INTERMEDIATES, *(calls.collections if training else calls.changing)}
        if recorder is not None:
            mutable.update(recorder.collections)
            if recorder.perturbations:
                variables[PERTURBATIONS] = recorder.perturbations
        # Counted even if the call fails, so that no later call repeats its random numbers.
        number, calls.count = calls.count, calls.count + 1
        run = functools.partial(self._linen.modes[training].apply, variables)
        try:
            output, updates = self._run(run, getters, args, kwargs, sorted(mutable), number)
        except errors.ScopeParamNotFoundError as error:
            raise UserError(
                'the model uses a parameter that was not created by initialization, which runs in '
                'evaluation mode. Call all submodules in both modes, and select their outputs '
                f'afterwards.\n{str(error).partition(chr(10))[0]}'
            ) from error
        if recorder is not None:
            calls.intermediates = recorder.take_records(calls.intermediates)
            if perturbations := updates.pop(PERTURBATIONS, None):
                recorder.add_perturbations(perturbations)
        if updates:
            if not training:
                self._check_trace()
            self._check_structure(updates)
            calls.collections = {
                **calls.collections,
                **precision.restore_dtypes(updates, calls.collections),
            }
        return output if precision.output is None else precision.cast_output(output)

    def _run(
        self,
        run: Callable[..., Any],
        getters: Getters,
        args: Any,
        kwargs: Any,
        mutable: Any,
        number: int = 0,
    ) -> tuple[Any, dict[str, Any]]:
        """Applies the module and returns its output and the changed collections.

        The intermediates are removed from these and become `model.intermediates`.

        Args:
            run: `apply` or `init_with_output` of the module: pure, so that it can be repeated.
            getters: functions that lead from the module to the method; empty for `__call__`.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            mutable: the collections that may change.
            number: index of this call among those of the step.
        """
        training, calls = self._keys.mode == 'train', self._calls
        method = functools.partial(train_flags.call_with_training, getters, training)
        with contextlib.ExitStack() as stack:  # Interceptors of methods, outermost first.
            stack.enter_context(nn.intercept_methods(self._intercept))
            if calls.recorder is not None:
                stack.enter_context(calls.recorder.intercept_linen())
            for adapter in adapters.registered:
                stack.enter_context(nn.intercept_methods(adapter.intercept))
            if 'flax.nnx.bridge' in sys.modules:  # Otherwise the model contains no bridge.
                stack.enter_context(self._linen.pmap_axes.intercept_calls())
                stack.enter_context(nnx_bridge.pass_training_to_nnx(training))
            requested = mutable
            # Repeated until all RNG streams of the module are known: Flax has no list of them.
            while True:
                rngs = {name: self._keys.stream(name) for name in sorted(self._streams.names)}
                # Later calls of a step must draw other numbers than the first one.
                if number:
                    rngs = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
                try:
                    output, updates = run(
                        *args, rngs=rngs, method=method, mutable=mutable, **kwargs
                    )
                    break
                except errors.InvalidRngError as error:
                    self._streams.learn(error)
                except TypeError as error:
                    # Flax requires all branches of `nn.cond` to change the same collections. In
                    # plain Flax a module may sow in one branch if 'intermediates' is immutable, so
                    # retry without that collection.
                    if mutable is not requested or not compat.branches_differ(error, INTERMEDIATES):
                        raise
                    mutable = compat.without_collection(mutable, INTERMEDIATES)
        updates = dict(updates)
        intermediates = updates.pop(INTERMEDIATES, {})
        for adapter in adapters.registered:
            intermediates = adapter.plain(intermediates)
        calls.intermediates = dict(intermediates)
        return output, updates

    def _intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Linen interceptor for the layers that need special treatment.

        One for all of them, because every interceptor costs tracing time in each method call.
        """
        if isinstance(context.module, LINEN_NORMS):
            return self._linen.pmap_axes.intercept(next_fun, args, kwargs, context)
        if isinstance(context.module, nn.DenseGeneral):
            return flat_init.intercept(next_fun, args, kwargs, context)
        return next_fun(*args, **kwargs)

    def _check_structure(self, updates: Variables) -> None:
        for name, value in updates.items():
            before: Any = jax.tree.structure(self._calls.collections[name])
            after: Any = jax.tree.structure(value)
            if before != after:
                raise ValueError(
                    f'the call changed the structure of the collection {name!r} from {before} to '
                    f'{after}; the state must keep its structure, so sown values that accumulate '
                    "belong in 'intermediates' or need init_fn and reduce_fn"
                )


class _InitModel(LinenModel):
    """A model during initialization: each call creates the variables that are still missing."""

    def fresh_collections(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self(*args, **kwargs)
        fresh: dict[str, Any] = meta.unbox(self.collections)
        return fresh

    def stop_gradient(self, pattern: str) -> LinenModel:
        return self

    @property
    def ema(self) -> LinenModel:
        return self

    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        # The inputs are not cast: with the new float32 parameters, the carry of a scan over layers
        # would start in half precision and become float32.
        def init(*args: Any, rngs: dict[str, jax.Array], **options: Any) -> Any:
            return self._linen.modes[False].init_with_output(rngs, *args, **options)

        # Intermediates are allowed, because a task may read them; `_run` removes them.
        mutable = nn.DenyList((PERTURBATIONS,))
        output, new = self._run(init, getters, args, kwargs, mutable)
        # A second call creates equal values for parameters that it shares with the first (their
        # keys are derived from their paths), so it does not matter which of the two is kept.
        flat = {**traverse_util.flatten_dict(new), **traverse_util.flatten_dict(self.variables)}
        variables = traverse_util.unflatten_dict(flat)
        self._params = variables.pop('params', {})
        self._calls.collections = variables
        return self._precision.cast_output(output)


def _new_model(linen: Linen, keys: Keys) -> _InitModel:
    streams = Streams({'params', 'dropout', 'default'})
    return _InitModel({}, Calls({}), keys, None, linen.precision, _linen=linen, _streams=streams)
