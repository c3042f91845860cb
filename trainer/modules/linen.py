# SPDX-License-Identifier: Apache-2.0
"""Linen modules as functions of (variables, rngs, mode), and the bound view that a task calls."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors, traverse_util

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import adapters, flat_init, recorder, train_flags
from trainer.modules.method import make_method
from trainer.modules.model_view import BoundModel, Calls, Steps
from trainer.modules.pmap_axes import PmapAxes
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.rng import Keys
from trainer.modules.rng_streams import Streams

Variables = Mapping[str, Any]

# Dropout that is active at evaluation is always a mistake: without a key Flax says so.
_TRAIN_ONLY_STREAMS = frozenset({'dropout'})


@dataclasses.dataclass(frozen=True)
class Linen:
    """A Linen module for the step functions.

    Attributes:
        module: the module.
        precision: the dtypes of its parameters, its computation and its output.
        pmap_axes: leaves axes of `jax.pmap` out of its normalisation layers.
    """

    module: nn.Module
    precision: Precision = AS_IS
    pmap_axes: PmapAxes = dataclasses.field(default_factory=PmapAxes, compare=False, repr=False)

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables of everything that `task` calls on this batch.

        Those whose dimensions the module names are still in their boxes (`flax.core.meta`).

        Args:
            task: called as `task(model, batch)`, in evaluation mode: initialisation needs no
                dropout and does not move batch statistics.
            batch: arrays with the training batch's shapes; the values do not matter.
            keys: the keys of mode 'init'.
        """
        bound = _InitModel(self.module, keys, self.precision, self.pmap_axes)
        task(bound, batch)
        return {**bound.variables, 'params': self.precision.for_params(bound.params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> LinenModel:
        """Returns the callable that a task gets; `keys.mode` says whether it trains."""
        return LinenModel(
            self.module,
            variables,
            keys,
            ema=ema,
            precision=self.precision,
            pmap_axes=self.pmap_axes,
        )


class LinenModel(BoundModel):
    """A Linen module bound to variables: see `BoundModel`."""

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        keys: Keys,
        *,
        ema: Any = None,
        precision: Precision = AS_IS,
        pmap_axes: PmapAxes | None = None,
    ):
        """Binds; nothing runs before a call."""
        collections = {name: value for name, value in variables.items() if name != 'params'}
        calls = Calls(collections)
        super().__init__(variables['params'], calls, keys, ema=ema, precision=precision)
        self._module = train_flags.set_fields(module, self.training)
        self._pmap_axes = pmap_axes or PmapAxes()
        # Shared with the views, as the calls are.
        # The stream 'default' is what NNX modules inside ask for: without it they get a constant.
        known, never = ({'dropout'}, ()) if self.training else ((), _TRAIN_ONLY_STREAMS)
        self._streams = Streams({'default', *known}, frozenset(never))

    def _field(self, name: str) -> Any:
        return getattr(self._module, name) if name in train_flags.fields(self._module) else None

    def _call(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        with self._pmap_axes.calling(), flat_init.unconstrained():
            return super()._call(steps, args, kwargs)

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        calls = self._calls
        # What nobody reads of the intermediates, the compiler drops.
        given = calls.tap.collections if calls.tap else (recorder.INTERMEDIATES,)
        mutable = sorted({*given, *(calls.collections if self.training else ())})
        args, kwargs = self._precision.for_compute((args, kwargs))
        variables = {**self.variables, 'params': self._precision.for_compute(self.params)}
        if calls.tap is not None and calls.tap.perturbations:
            variables[recorder.PERTURBATIONS] = calls.tap.perturbations
        call, calls.count = calls.count, calls.count + 1

        def run(rngs: dict[str, jax.Array]) -> Any:
            method = make_method(steps, self.training)
            with calls.tap.on_linen() if calls.tap else contextlib.nullcontext():
                return _sowing(
                    lambda collections: self._module.apply(
                        variables, *args, rngs=rngs, method=method, mutable=collections, **kwargs
                    ),
                    mutable,
                )

        try:
            output, updates = self._streams.run(
                run, lambda name: _nth(self._keys.stream(name), call)
            )
        except errors.ScopeParamNotFoundError as error:
            raise UserError(
                'the model asks for a parameter that it did not have when it was made, which '
                'happens in evaluation mode. Make all parts in both modes, and choose afterwards '
                f'what of them is used.\n{str(error).partition(chr(10))[0]}'
            ) from error
        updates = dict(updates)
        calls.intermediates = _plain(updates.pop(recorder.INTERMEDIATES, {}))
        if calls.tap is not None:
            calls.intermediates = calls.tap.keep(calls.intermediates)
            if perturbations := updates.pop(recorder.PERTURBATIONS, None):
                calls.tap.perturb_more(perturbations)
        self._check_structure(updates)
        calls.collections.update(self._precision.like(updates, calls.collections))
        return self._precision.for_output(output)

    def _check_structure(self, updates: Variables) -> None:
        for name, value in updates.items():
            before: Any = jax.tree.structure(self._calls.collections[name])
            after: Any = jax.tree.structure(value)
            if before != after:
                raise ValueError(
                    f'the call changed the structure of the collection {name!r} from {before} to '
                    f'{after}; the state must keep its structure, so values that pile up (sow) '
                    "belong in 'intermediates' or need init_fn and reduce_fn"
                )


class _InitModel(LinenModel):
    """A model without variables yet: each call makes those that are still missing."""

    def __init__(self, module: nn.Module, keys: Keys, precision: Precision, pmap_axes: PmapAxes):
        super().__init__(module, {'params': {}}, keys, precision=precision, pmap_axes=pmap_axes)
        self._streams = Streams({'params', 'dropout', 'default'})

    def stop_gradient(self, pattern: str) -> LinenModel:
        return self

    @property
    def ema(self) -> LinenModel:
        return self

    def _apply(self, steps: Steps, args: Any, kwargs: Any) -> Any:
        # The inputs are not cast: with the new float32 parameters, the carry of a scan over layers
        # would start in half precision and become float32.
        def run(rngs: dict[str, jax.Array]) -> Any:
            # A task may read what is sown; the state never holds it.
            mutable = nn.DenyList((recorder.PERTURBATIONS,))
            method = make_method(steps, training=False)
            return _sowing(
                lambda collections: self._module.init_with_output(
                    rngs, *args, method=method, mutable=collections, **kwargs
                ),
                mutable,
            )

        output, made = self._streams.run(run, self._keys.stream)
        made = dict(made)
        self._calls.intermediates = _plain(made.pop(recorder.INTERMEDIATES, {}))
        # A second call makes equal values for what it shares with the first (a parameter's key
        # comes from its path), so it does not matter which of the two is kept.
        flat = {**traverse_util.flatten_dict(made), **traverse_util.flatten_dict(self.variables)}
        variables = traverse_util.unflatten_dict(flat)
        self._params = variables.pop('params', {})
        self._calls.collections = variables
        return self._precision.for_output(output)


def _sowing(apply: Callable[[Any], Any], mutable: Any) -> Any:
    """Returns `apply(mutable)`; without intermediates where branches of `nn.cond` sow some.

    Flax wants all branches to leave the same behind. A module may sow in one of them as long as
    nobody listens, and so it stays.
    """
    with contextlib.ExitStack() as stack:
        for adapter in adapters.registered:
            stack.enter_context(nn.intercept_methods(adapter.intercept))
        try:
            return apply(mutable)
        except TypeError as error:
            if not compat.branches_differ(error, recorder.INTERMEDIATES):
                raise
        return apply(compat.without_collection(mutable, recorder.INTERMEDIATES))


def _plain(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    for adapter in adapters.registered:
        intermediates = adapter.plain(intermediates)
    return dict(intermediates)


def _nth(key: jax.Array, call: int) -> jax.Array:
    return jax.random.fold_in(key, call) if call else key
