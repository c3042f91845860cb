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

from trainer import compat
from trainer.config.errors import UserError
from trainer.modules import patterns, reuse, seen
from trainer.modules.precision import AS_IS, Precision
from trainer.modules.recorder import ModuleRecorder
from trainer.modules.rng import Keys

# Types of fields that are returned unchanged.
_PLAIN = (bool, int, float, str)
# Functions that lead from a module to a method or submodule, applied one after the other.
Getters = tuple[Callable[[Any], Any], ...]


@dataclasses.dataclass
class Calls:
    """The state that a model shares with its views, updated by each call.

    Attributes:
        collections: the variables other than parameters, after the calls so far.
        count: number of calls so far; folded into the random keys of the next one.
        intermediates: the intermediates of the last call.
        recorder: records the calls; None records nothing.
        changing: names of the collections that calls change in evaluation too.
        trace: if there are any, the trace of JAX in which calls may change them.
    """

    collections: dict[str, Any]
    count: int = 0
    intermediates: dict[str, Any] = dataclasses.field(default_factory=dict)
    recorder: ModuleRecorder | None = None
    changing: frozenset[str] = frozenset()
    trace: Any = None


@dataclasses.dataclass(eq=False, repr=False)
class BoundModel(abc.ABC):
    """A module bound to variables, RNG keys and the training flag, as a task calls it.

    `model(x)` runs `__call__`; `model.encode(x)`, `model.encoder(x)` or `model.layers[0](x)` runs a
    method or a submodule (of a Linen module, one that `setup` assigns: those of a compact method
    have no name outside of it). `model.width` reads a field that is a number, a string or a tuple
    of these, and `model.temperature` the value of an NNX module's own variable. Names of this class
    hide those of the module.

    The model may be called several times: the next call sees the collections that a call changes
    (batch statistics), and each call draws its own random numbers. The views `ema` and
    `stop_gradient` are the same model with other parameters; they share its state and its count of
    calls.

    Attributes:
        params: the parameters of this view.
        training: whether this is a training step.
    """

    _params: Any
    _calls: Calls
    _keys: Keys
    _ema: Any = None
    _precision: Precision = AS_IS

    # For the train step and the task's runner: not copies, and no functions of their own in the
    # step's call chain.
    own_collections = property(operator.attrgetter('_calls.collections'))
    own_keys = property(operator.attrgetter('_keys'))
    # Whether calls change collections in evaluation, too.
    changes_collections = property(operator.attrgetter('_calls.changing'))

    @property
    def collections(self) -> dict[str, Any]:
        """Every variable collection except the parameters, after the calls so far."""
        return dict(self._calls.collections)

    @property
    def training(self) -> bool:
        """Whether this is a training step."""
        return self._keys.mode == 'train'

    @property
    def params(self) -> Any:
        """The nested dict of parameters, after `stop_gradient` where this is such a view."""
        return self._params

    @property
    def variables(self) -> dict[str, Any]:
        """Every variable collection, after the calls so far."""
        return {'params': self._params, **self._calls.collections}

    @property
    def intermediates(self) -> dict[str, Any]:
        """The values that modules sowed into 'intermediates' in the last call, as nested dicts.

        A sown value is a tuple with an item for each `sow`, unless the module sets another
        `reduce_fn`; an `nnx.Intermediate` that an NNX module assigns is the value itself.
        """
        return self._calls.intermediates

    def remember(self) -> Callable[[], None]:
        """Returns a function that undoes the side effects of all later calls."""
        calls, recorder = self._calls, self._calls.recorder
        before = dataclasses.replace(calls, collections=dict(calls.collections))
        forget_records = None if recorder is None else recorder.remember()

        def forget() -> None:
            calls.collections = dict(before.collections)
            calls.count, calls.intermediates = before.count, before.intermediates
            if forget_records is not None:
                forget_records()

        return forget

    def attach(self, recorder: ModuleRecorder) -> None:
        """Records all later calls, including those of the views."""
        self._calls.recorder = recorder

    def allow_changes(self, collections: frozenset[str]) -> None:
        """Lets later calls change these collections in evaluation, such as a cache."""
        self._calls.changing = collections
        self._calls.trace = compat.current_trace() if collections else None

    def fresh_collections(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the collections that initialization with these inputs of the model creates.

        Such as an empty cache: a module that decodes one token at a time makes its cache as long as
        the inputs of its initialization. Parameters are not among them.

        Raises:
            UserError: if the model is not a single Linen module.
        """
        raise UserError(
            'model.fresh_collections: only a Linen module creates collections by a call, and only '
            'if it is not a member of an ensemble'
        )

    def with_collections(self, **collections: Any) -> BoundModel:
        """Returns a model with these collections, which its calls change, in evaluation too.

        It has a state of its own, so it can be called in a loop or another transformation of JAX:
        create it there from the loop's values, and return its `collections`.

        Args:
            **collections: nested dicts of arrays by name of the collection, such as `cache`.
        """
        view, calls = copy.copy(self), self._calls
        view._calls = Calls({**calls.collections, **collections}, calls.count)
        view.allow_changes(calls.changing.union(collections))
        return view

    @property
    def ema(self) -> BoundModel:
        """The same model with the moving average of the parameters.

        Raises:
            ValueError: if the run has no moving average (`config.ema`).
        """
        if self._ema is None:
            raise ValueError('model.ema: this run has no moving average; set config.ema.decay')
        return self._with_params(self._ema)

    def rng(self, name: str) -> jax.Array:
        """Returns the random key of the stream `name` in this step."""
        return self._keys.stream(name)

    def stop_gradient(self, pattern: str) -> BoundModel:
        """Returns the model without gradients of the parameters whose full path matches `pattern`.

        Raises:
            UserError: if the pattern matches no parameter.
        """
        where = 'model.stop_gradient'
        expression = patterns.compile_pattern(pattern, where)
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
        # Private names would recurse while the model is being copied.
        if name.startswith('_'):
            raise AttributeError(name)
        field = self._field(name)
        if isinstance(field, (*_PLAIN, jax.Array)):
            return field
        if isinstance(field, tuple) and all(isinstance(item, _PLAIN) for item in field):
            return field
        return getattr(_Method(self), name)

    def _with_params(self, params: Any) -> BoundModel:
        # Shallow: the view shares `_calls`, so calls of both count together.
        view = copy.copy(self)
        view._params = params
        return view

    def _call(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        record, call = seen.current.get(), None
        if record is not None:
            # `attrgetter` and `itemgetter` offer their names through pickling only.
            name = '.'.join(['model', *(str(getter.__reduce__()[1][0]) for getter in getters)])
            call = record.note_call(name, args, kwargs)
        is_cast = self._precision.compute is not None
        with self._precision.model_scope() if is_cast else contextlib.nullcontext():
            known = reuse.current.get()
            if known is None or self._calls.recorder is not None:
                output = self._apply(getters, args, kwargs)
            else:
                output = self._apply_once(known, getters, args, kwargs)
        if record is not None and call is not None:
            call.end(output, keep=record.keeps_results)
        return output

    def _apply_once(
        self, known: reuse.CallResults, getters: Getters, args: Any, kwargs: Any
    ) -> Any:
        """Returns the output of `_apply`, from an earlier call if that was the same."""
        calls, keys = self._calls, self._keys

        def make() -> Any:
            output = self._apply(getters, args, kwargs)
            return output, calls.collections, calls.intermediates, calls.count

        # `attrgetter` and `itemgetter` are compared through pickling only.
        static = (*(getter.__reduce__() for getter in getters), keys.mode, calls.changing)
        random = (keys.seed, keys.step, keys.index, calls.count)
        result = known.find(make, static, (args, kwargs, self.variables, random))
        output, calls.collections, calls.intermediates, calls.count = result
        return output

    def _check_trace(self) -> None:
        """Checks that a call may change collections in evaluation."""
        trace = self._calls.trace
        if trace is not None and compat.current_trace() != trace:
            names = ', '.join(sorted(self._calls.changing))
            raise UserError(
                'the model is called within a loop or another transformation of JAX, which loses '
                f'the changes of its collection {names}. Call a model that is created there, '
                'from the values of the loop: model.with_collections(...)'
            )

    @abc.abstractmethod
    def _apply(self, getters: Getters, args: Any, kwargs: Any) -> Any:
        """Calls the method or submodule that `getters` lead to, and stores changed collections."""

    @abc.abstractmethod
    def _field(self, name: str) -> Any:
        """Returns the attribute of the module with this name, or None."""


@dataclasses.dataclass(frozen=True)
class _Method:
    """`model.encoder` or `model.layers[0].attend`: a method or submodule to call.

    The attributes are read within the call only: outside of it a Linen module is not set up.
    """

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


def path_names(path: Iterable[Any]) -> tuple[str, ...]:
    """Returns ('Dense_0', 'kernel') for the key path of a leaf.

    Named tuples and dicts give the same names: Orbax restores the former as the latter.
    """
    return tuple(param_path((key,)) for key in path)


def param_path(path: Iterable[Any]) -> str:
    """Returns 'Dense_0/kernel' for the key path of a leaf."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')
