# SPDX-License-Identifier: Apache-2.0
"""The model as a task calls it: bound to variables, RNG keys and the training flag."""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax

from trainer.config import patterns
from trainer.modules import seen
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.recorder import ModuleRecorder
from trainer.modules.rng import Keys

# Types of fields that are returned as they are.
_PLAIN = (bool, int, float, str)
# Functions from a module to a method or a part of it, applied one after the other.
Getters = tuple[Callable[[Any], Any], ...]


@dataclasses.dataclass
class Calls:
    """The state that a model shares with its views, updated by each call.

    Attributes:
        collections: the variables other than parameters, after the calls so far.
        count: number of calls so far.
        intermediates: the intermediates of the last call.
        recorder: records the calls; None records nothing.
    """

    collections: dict[str, Any]
    count: int = 0
    intermediates: dict[str, Any] = dataclasses.field(default_factory=dict)
    recorder: ModuleRecorder | None = None


@dataclasses.dataclass(eq=False, repr=False)
class BoundModel(abc.ABC):
    """A module bound to variables, RNG keys and the training flag, as a task calls it.

    `model(x)` runs `__call__`; `model.encode(x)`, `model.encoder(x)` or `model.layers[0](x)` runs a
    method or a sub-module (of a Linen module, one that `setup` makes: what a compact method makes
    has no name outside of it); a number or string among the module's fields, or a tuple of them, is
    read as `model.width`, and the value of an NNX module's own variable as `model.temperature`.
    Names of this class hide those of the module.

    It may be called several times: collections that a call changes (batch statistics) are seen by
    the next call, and each call draws its own random numbers. The views `ema` and `stop_gradient`
    are the same model with other parameters: their calls count among its own.

    Attributes:
        params: the parameters of this view.
        training: whether this is a training step.
    """

    _params: Any
    _calls: Calls
    _keys: Keys
    _ema: Any = None
    _precision: Precision = AS_IS

    # For the step, which returns it: not a copy, and one function less to read through.
    own_collections = property(operator.attrgetter('_calls.collections'))

    @property
    def collections(self) -> dict[str, Any]:
        """Every variable collection but the parameters, after the calls so far."""
        return dict(self._calls.collections)

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self._keys.mode == 'train'

    @property
    def params(self) -> Any:
        """The nested dict of parameters, with `stop_gradient` applied where it was asked for."""
        return self._params

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection, after the calls so far."""
        return {'params': self._params, **self._calls.collections}

    @property
    def intermediates(self) -> dict[str, Any]:
        """What modules have sown into 'intermediates' in the last call, as nested dicts.

        A sown value is a tuple with one value for each time, unless the module says otherwise; what
        an NNX module assigns as `nnx.Intermediate` is there as it is.
        """
        return self._calls.intermediates

    def remember(self) -> Callable[[], None]:
        """Returns a function that undoes the side effects of all calls from here on."""
        calls, recorder = self._calls, self._calls.recorder
        before = dataclasses.replace(calls, collections=dict(calls.collections))
        back = None if recorder is None else recorder.remember()

        def forget() -> None:
            calls.collections = dict(before.collections)
            calls.count, calls.intermediates = before.count, before.intermediates
            if back is not None:
                back()

        return forget

    def attach(self, recorder: ModuleRecorder) -> None:
        """Records all calls from here on, including those of the views."""
        self._calls.recorder = recorder

    @property
    def ema(self) -> BoundModel:
        """The same model with the moving average of the parameters.

        Raises:
            ValueError: if the config keeps no average (`config.ema`).
        """
        if self._ema is None:
            raise ValueError('model.ema: this run keeps no average; set config.ema.decay')
        return self._with_params(self._ema)

    def rng(self, name: str) -> jax.Array:
        """Returns the random key of the stream `name` in this step."""
        return self._keys.stream(name)

    def stop_gradient(self, pattern: str) -> BoundModel:
        """Returns the model with no gradient into parameters whose whole path matches `pattern`.

        Raises:
            UserError: if it matches none.
        """
        where = 'model.stop_gradient'
        expression = patterns.compiled(pattern, where)
        paths = [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.params)]
        patterns.check_used([pattern], paths, where)

        def stop(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
            matches = expression.fullmatch(param_path(path))
            return jax.lax.stop_gradient(value) if matches else value

        return self._with_params(jax.tree_util.tree_map_with_path(stop, self.params))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's `__call__` and returns its output."""
        return self._call((), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        field = self._field(name)
        if isinstance(field, (*_PLAIN, jax.Array)):
            return field
        if isinstance(field, tuple) and all(isinstance(item, _PLAIN) for item in field):
            return field
        return getattr(_Method(self), name)

    def _with_params(self, params: Any) -> BoundModel:
        view = copy.copy(self)
        view._params = params
        return view

    def _call(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        noted, call = seen.current.get(), None
        if noted is not None:
            name = '.'.join(['model', *(str(getter.__reduce__()[1][0]) for getter in getters)])
            call = noted.note_call(name, args, kwargs)
        is_cast = self._precision.compute is not None
        with self._precision.model_scope() if is_cast else contextlib.nullcontext():
            output = self._apply(getters, args, kwargs)
        if call is not None:
            call.output = seen.describe(output)
        return output

    @abc.abstractmethod
    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        """Calls the method or part at the end of `getters`, and stores changed collections."""

    @abc.abstractmethod
    def _field(self, name: str) -> Any:
        """Returns the attribute of the module with this name, None if there is none."""


@dataclasses.dataclass(frozen=True)
class _Method:
    """`model.encoder` or `model.layers[0].attend`: a method or submodule that can be called."""

    _model: BoundModel
    _getters: Getters = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model._call(self._getters, args, kwargs)

    def __getattr__(self, name: str) -> _Method:
        if name.startswith('_'):
            raise AttributeError(name)
        return _Method(self._model, (*self._getters, operator.attrgetter(name)))

    def __getitem__(self, key: int | str) -> _Method:
        return _Method(self._model, (*self._getters, operator.itemgetter(key)))


def param_path(path: Iterable[Any]) -> str:
    """Returns 'Dense_0/kernel' for the key path of a leaf."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')
