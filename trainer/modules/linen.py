# SPDX-License-Identifier: Apache-2.0
"""Linen modules as functions of (variables, rngs, mode), and the bound view that a task calls."""

from __future__ import annotations

import copy
import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from trainer.config.errors import UserError
from trainer.modules import mode
from trainer.modules.streams import Streams
from trainer.step.precision import AS_IS, Precision
from trainer.step.rng import Keys

Variables = Mapping[str, Any]

# What leads from a module to a part of it.
_Steps = tuple[Callable[[Any], Any], ...]

# Dropout that is active at evaluation is always a mistake: without a key Flax says so.
_TRAIN_ONLY_STREAMS = frozenset({'dropout'})


@dataclasses.dataclass(frozen=True)
class Linen:
    """A Linen module for the step functions.

    Attributes:
        module: the module.
        precision: the dtypes of its parameters, its computation and its output.
    """

    module: nn.Module
    precision: Precision = AS_IS

    def init(self, task: Callable[..., Any], batch: Mapping[str, Any], keys: Keys) -> Variables:
        """Returns fresh variables of everything that `task` calls on this batch.

        Those whose dimensions the module names are still in their boxes (`flax.core.meta`).

        Args:
            task: called as `task(model, batch)`, in evaluation mode: initialisation needs no
                dropout and does not move batch statistics.
            batch: arrays with the training batch's shapes; the values do not matter.
            keys: the keys of mode 'init'.
        """
        bound = _InitModel(self.module, keys, self.precision)
        task(bound, batch)
        return {**bound.variables, 'params': self.precision.for_params(bound.params)}

    def bind(self, variables: Variables, keys: Keys, *, ema: Any = None) -> BoundModel:
        """Returns the callable that a task gets; `keys.mode` says whether it trains."""
        return BoundModel(self.module, variables, keys, ema=ema, precision=self.precision)


class BoundModel:
    """A module bound to parameters, collections, random keys and a mode: what a task calls.

    `model(x)` runs `__call__`; `model.encode(x)`, `model.encoder(x)` or `model.layers[0](x)` runs a
    method or a sub-module made in `setup` (what a compact method makes has no name outside of it);
    a number or string among the module's fields is read as `model.width`. Names of this class hide
    those of the module.

    It may be called several times: collections that a call changes (batch statistics) are seen by
    the next call, and each call draws its own random numbers. The views `ema` and `stop_gradient`
    are the same model with other parameters: their calls count among its own.

    Attributes:
        params: the parameters of this view.
        training: whether this is a training step.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Variables,
        keys: Keys,
        *,
        ema: Any = None,
        precision: Precision = AS_IS,
    ):
        self._keys = keys
        self._precision = precision
        self.training = keys.mode == 'train'
        self._module = mode.set_fields(module, self.training)
        self._params = variables['params']
        self._ema = ema
        self._calls = _Calls(
            collections={name: value for name, value in variables.items() if name != 'params'},
            streams=Streams({'dropout'}) if self.training else Streams(set(), _TRAIN_ONLY_STREAMS),
        )

    @property
    def params(self) -> Any:
        """The nested dict of parameters, with `stop_gradient` applied where it was asked for."""
        return self._params

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection, as the calls so far have left them."""
        return {'params': self._params, **self._calls.collections}

    @property
    def collections(self) -> dict[str, Any]:
        """Every variable collection but the parameters, as the calls so far have left them."""
        return dict(self._calls.collections)

    @property
    def ema(self) -> BoundModel:
        """The same model with the moving average of the parameters.

        Raises:
            ValueError: if the config keeps no average (`config.ema`).
        """
        if self._ema is None:
            raise ValueError('model.ema: this run keeps no average; set config.ema.decay')
        return self._with(self._ema)

    def rng(self, name: str) -> jax.Array:
        """Returns the random key of the stream `name` in this step."""
        return self._keys.stream(name)

    def stop_gradient(self, pattern: str) -> BoundModel:
        """Returns the model with no gradient into parameters whose whole path matches `pattern`.

        Raises:
            UserError: if it matches none.
        """
        expression = re.compile(pattern)
        paths = [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.params)]
        if not any(map(expression.fullmatch, paths)):
            raise UserError(
                f'model.stop_gradient({pattern!r}) matches no parameter. A pattern must match a '
                f'whole path, such as {", ".join(paths[:5])}'
            )

        def stop(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
            matches = expression.fullmatch(param_path(path))
            return jax.lax.stop_gradient(value) if matches else value

        return self._with(jax.tree_util.tree_map_with_path(stop, self.params))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's `__call__` and returns its output."""
        return self._apply((), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        if name in mode.fields(self._module):
            field = getattr(self._module, name)
            if isinstance(field, (bool, int, float, str)):
                return field
        return getattr(_Method(self), name)

    def _with(self, params: Any) -> BoundModel:
        view = copy.copy(self)
        view._params = params
        return view

    def _apply(self, steps: _Steps, args: Any, kwargs: Any) -> Any:
        calls = self._calls
        mutable: Any = (self.training and sorted(calls.collections)) or False
        args, kwargs = self._precision.for_compute((args, kwargs))
        variables = {**self.variables, 'params': self._precision.for_compute(self.params)}
        call, calls.count = calls.count, calls.count + 1

        def run(rngs: dict[str, jax.Array]) -> Any:
            method = mode.method(steps, self.training)
            return self._module.apply(
                variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
            )

        output = calls.streams.run(run, lambda name: _nth(self._keys.stream(name), call))
        if mutable:
            output, updates = output
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


@dataclasses.dataclass
class _Calls:
    """What the calls of a model and of its views have in common.

    Attributes:
        collections: the variables that are not parameters, as the calls so far have left them.
        streams: the random streams that the calls so far have asked for.
        count: number of calls so far.
    """

    collections: dict[str, Any]
    streams: Streams
    count: int = 0


class _InitModel(BoundModel):
    """A model without variables yet: each call makes those that are still missing."""

    def __init__(self, module: nn.Module, keys: Keys, precision: Precision):
        super().__init__(module, {'params': {}}, keys, precision=precision)
        self._calls.streams = Streams({'params', 'dropout'})

    def stop_gradient(self, pattern: str) -> BoundModel:
        return self

    @property
    def ema(self) -> BoundModel:
        return self

    def _apply(self, steps: _Steps, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._precision.for_compute((args, kwargs))

        def run(rngs: dict[str, jax.Array]) -> Any:
            mutable = nn.DenyList(('intermediates', 'perturbations'))
            method = mode.method(steps, training=False)
            return self._module.init_with_output(
                rngs, *args, method=method, mutable=mutable, **kwargs
            )

        output, made = self._calls.streams.run(run, self._keys.stream)
        # A second call makes equal values for what it shares with the first (a parameter's key
        # comes from its path), so it does not matter which of the two is kept.
        flat = {**traverse_util.flatten_dict(made), **traverse_util.flatten_dict(self.variables)}
        variables = traverse_util.unflatten_dict(flat)
        self._params = variables.pop('params', {})
        self._calls.collections = variables
        return self._precision.for_output(output)


@dataclasses.dataclass(frozen=True)
class _Method:
    """`model.encoder` or `model.layers[0].attend`: the way to a method or sub-module to call."""

    _model: BoundModel
    _steps: _Steps = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model._apply(self._steps, args, kwargs)

    def __getattr__(self, name: str) -> _Method:
        if name.startswith('_'):
            raise AttributeError(name)
        return _Method(self._model, (*self._steps, operator.attrgetter(name)))

    def __getitem__(self, key: int | str) -> _Method:
        return _Method(self._model, (*self._steps, operator.itemgetter(key)))


def param_path(path: Iterable[Any]) -> str:
    """Returns 'Dense_0/kernel' for the key path of a leaf."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def _nth(key: jax.Array, call: int) -> jax.Array:
    return jax.random.fold_in(key, call) if call else key
