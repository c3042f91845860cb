# SPDX-License-Identifier: Apache-2.0
"""Runs functions of one example on the rows of a batch: the user's, and those of other libraries.

The random numbers of an example depend on the seed, its epoch and its id alone, so each way to draw
them is tied to the example's numpy generator: a function gets it as `rng`, an object that holds
random state of its own gets a seed from it, and so do the global generators of Python, numpy and
PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import global_random, nested
from .nested import Tree
from .rng import ExampleRng, wants_rng

# Packages whose transforms draw from global generators (Albumentations did before 1.4.19).
_GLOBAL = frozenset({'torchvision', 'torch', 'albumentations'})


class _Copies(threading.local):
    """Copies of objects that hold random state, one set for each thread."""

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[Any, Any]] = {}


_copies = _Copies()

# A function of a value, or of an example, and the row of the batch that it is in.
_Call = Callable[[Any, int], Any]


@dataclasses.dataclass(frozen=True)
class PerExample:
    """Runs a function on one example at a time, and stacks what it returns.

    Convenient but slow: Python code runs once per example. All results of a batch must have one
    shape; they may be numpy arrays, numbers, or anything with `__array__` (JAX and PyTorch arrays).

    Attributes:
        fn: without `field`, a function of an example (a dict, or another tree, as the source
            returns it) that returns the new example. With `field`, a function of the value of that
            field that returns the new value. If it has a parameter `rng`, it gets the example's
            numpy generator. A transform of Albumentations, or another that takes only named
            arguments, gets the value as `image`, or without `field` all fields of the example, and
            returns a dict; if it has a method `set_random_seed`, that is called for each example.
        field: the field to replace, by its path if it is nested ('inputs/x'); the others stay. None
            for functions of whole examples.
        seed_global: whether to seed the global generators (`random`, `numpy.random`, PyTorch) for
            each example. Threads then wait for each other; use the worker processes of
            `GrainLoader` instead. By default this is done for transforms of torchvision, and
            another function that draws from these generators is an error.
    """

    fn: Callable[..., Any]
    _: dataclasses.KW_ONLY
    field: str | None = None
    seed_global: bool | None = None
    # Whether the first call has been checked; a list, because the dataclass is frozen.
    _checked: list[bool] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.fn, type) or not callable(self.fn):
            raise ValueError(f'fn: expected a function of an example, got {self.fn!r:.100}')

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the results."""
        if self.field is not None and not nested.has_field(batch, self.field):
            names = ', '.join(nested.leaves_with_names(batch))
            raise ValueError(f'field: the batch has no {self.field!r}; it has {names}')
        call = self._bind_function(rng)
        if self._seeds_global:
            with global_random.restore_after():
                results = map_rows(self._seeding(call, rng), batch, self.field)
        else:
            results = map_rows(self._checking(call), batch, self.field)
        if self.field is None:
            return stack_examples(results, batch)
        return nested.with_field(batch, self.field, _stack_values(self.field, results))

    def _bind_function(self, rng: ExampleRng) -> _Call:
        """Returns `fn` as a function of a value, or an example, and its row."""
        # Once per batch: inspecting a signature takes longer than most transforms.
        if _takes_names(self.fn):
            return lambda value, row: self._call_with_names(value, rng.generator(row))
        if wants_rng(self.fn):
            return lambda value, row: self.fn(value, rng=rng.generator(row))
        return lambda value, row: self.fn(value)

    def _call_with_names(self, value: Any, generator: np.random.Generator) -> Any:
        fn: Any = self.fn
        if hasattr(fn, 'set_random_seed'):
            fn = _copy_of_thread(fn)
            fn.set_random_seed(int(generator.integers(2**32)))
        return fn(**value) if self.field is None else fn(image=value)['image']

    @property
    def _seeds_global(self) -> bool:
        if self.seed_global is not None:
            return self.seed_global
        return bool(_packages(self.fn) & _GLOBAL) and not hasattr(self.fn, 'set_random_seed')

    def _seeding(self, call: _Call, rng: ExampleRng) -> _Call:
        """Returns the function, which first seeds the global generators for the example."""

        def run(value: Any, row: int) -> Any:
            global_random.seed(int(rng.generator(row).integers(2**32)))
            return call(value, row)

        return run

    def _checking(self, call: _Call) -> _Call:
        """Returns the function; its first call of all raises if it draws from a global generator.

        Raises:
            ValueError: in that call. Such numbers differ from run to run, and after a resume.
        """
        if self._checked or self.seed_global is not None:
            return call

        def run(value: Any, row: int) -> Any:
            if self._checked:
                return call(value, row)
            with global_random.lock:
                # It may change the value in place.
                again, before = copy.deepcopy(value), global_random.states()
                result = call(value, row)
                if changed := global_random.changed_since(before):
                    # In its first call it may have imported a library that draws.
                    before = global_random.states()
                    call(again, row)
                    changed = global_random.changed_since(before)
            if changed:
                raise ValueError(
                    f'{self.fn!r:.100} draws from the global generator of {" and ".join(changed)}, '
                    'so a resumed run would draw other numbers. Draw from a numpy generator that '
                    'it takes as `rng`, or set seed_global=True in PerExample'
                )
            self._checked.append(True)
            return result

        return run


def map_rows(call: _Call, batch: Tree, field: str | None = None) -> list[Any]:
    """Returns the results of a function for the rows of a batch, in order.

    Args:
        call: called with an example, or with the value of its `field`, and the row.
        batch: arrays (n, ...).
        field: path of the field whose values are passed; None for whole examples.
    """
    values = batch if field is None else nested.get_field(batch, field)
    if isinstance(values, np.ndarray):
        return [call(value, row) for row, value in enumerate(values)]
    rows = range(len(nested.first_array(values)))
    return [call(nested.take_row(values, row), row) for row in rows]


def stack_examples(examples: list[Any], before: Tree) -> Tree:
    """Returns examples, dicts or other trees of values, as a batch.

    Args:
        examples: what a function has returned for the examples of a batch.
        before: that batch.

    Raises:
        TypeError: if one of them is not a tree of values.
        ValueError: if they differ in structure or shapes.
    """
    for example in examples:
        if not isinstance(example, Mapping | list | tuple):
            raise TypeError(
                f'a function of an example must return a dict, got {type(example).__name__}. If it '
                "is a function of one field, name that field: PerExample(fn=..., field='image')"
            )
    none, none_before = nested.paths_of_none(examples[0]), nested.paths_of_none(before)
    # None that was there before may have moved.
    if len(none) > len(none_before):
        new = min(none - none_before)
        raise TypeError(f'{new!r}: the function returned None; expected an array')
    return _stack_trees('', examples)


def _stack_values(field: str, values: list[Any]) -> Any:
    if values[0] is None:
        raise TypeError(f'{field!r}: the function returned None; expected an array')
    if nested.is_node(values[0]):
        return _stack_trees(f'{field}/', values)
    return _stack(field, *values)


def _stack_trees(prefix: str, examples: list[Any]) -> Tree:
    try:
        return nested.map_named(lambda name, *values: _stack(prefix + name, *values), *examples)
    except nested.StructureError as error:
        raise ValueError(
            'all examples need the same fields; a function of an example has returned a result '
            f'that differs from the first one: {error.difference}'
        ) from None


def _stack(name: str, *values: Any) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    for array in arrays:
        if array.shape != arrays[0].shape:
            raise ValueError(
                f'{name!r} has shape {arrays[0].shape} in one example and {array.shape} in '
                'another; all examples of a batch need one shape: crop, resize or pad them'
            )
    return np.stack(arrays)


def _takes_names(fn: Callable[..., Any]) -> bool:
    """Whether a function takes fields as named arguments, and returns a dict of them."""
    if 'albumentations' in _packages(fn):
        return True
    try:
        parameters = inspect.signature(fn).parameters
    except ValueError:  # Functions implemented in C may have no signature.
        return False
    kinds = {parameter.kind for parameter in parameters.values()} - {inspect.Parameter.VAR_KEYWORD}
    # One that can be seeded is called as those of Albumentations are: (*args, **fields).
    if callable(getattr(fn, 'set_random_seed', None)):
        kinds.discard(inspect.Parameter.VAR_POSITIONAL)
    return (
        bool(parameters) and 'rng' not in parameters and kinds <= {inspect.Parameter.KEYWORD_ONLY}
    )


def _packages(value: Any) -> set[str]:
    """Returns the packages that define the class of an object, and the bases of that class."""
    return {each.__module__.partition('.')[0] for each in type(value).__mro__}


def _copy_of_thread(fn: Any) -> Any:
    """Returns this thread's copy of an object whose random state is set before each call."""
    # Threads run the same transform at once, and would overwrite each other's seed. The original is
    # stored too, so that no other object can get its id.
    copies = _copies.by_id
    if id(fn) not in copies:
        copies[id(fn)] = (fn, copy.deepcopy(fn))
    return copies[id(fn)][1]
