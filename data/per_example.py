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
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import global_random
from .rng import ExampleRng, wants_rng
from .sources import Arrays

# Packages whose transforms draw from global generators (Albumentations did before 1.4.19).
_GLOBAL = frozenset({'torchvision', 'torch', 'albumentations'})


class _Copies(threading.local):
    """Copies of objects that hold random state, one set for each thread."""

    def __init__(self) -> None:
        self.by_id: dict[int, tuple[Any, Any]] = {}


_copies = _Copies()

# A function of a value, or of an example, and the row of the batch that it is in.
_Call = Callable[[Any, int], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerExample:
    """Runs a function on one example at a time, and stacks what it returns.

    Convenient but slow: Python code runs once per example. All results of a batch must have one
    shape; they may be numpy arrays, numbers, or anything with `__array__` (JAX and PyTorch arrays).

    Attributes:
        fn: without `field`, a function of an example (a dict) that returns the new example. With
            `field`, a function of the value of that field that returns the new value. If it has a
            parameter `rng`, it gets the example's numpy generator. A transform of Albumentations is
            called with its named arguments: the value as `image`, or without `field` all fields of
            the example; its seed is set for each example.
        field: the field to replace; the others stay. None for functions of whole examples.
        seed_global: whether to seed the global generators (`random`, `numpy.random`, PyTorch) for
            each example. Threads then wait for each other; use the worker processes of
            `GrainLoader` instead. By default this is done for transforms of torchvision, and
            another function that draws from these generators is an error.
    """

    fn: Callable[..., Any]
    field: str | None = None
    seed_global: bool | None = None
    # Whether the first call has been checked; a list, because the dataclass is frozen.
    _checked: list[bool] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.fn, type) or not callable(self.fn):
            raise ValueError(f'fn: expected a function of an example, got {self.fn!r:.100}')

    def __call__(self, batch: Arrays, rng: ExampleRng) -> Arrays:
        """Returns the batch with the results."""
        if self.field is not None and self.field not in batch:
            raise ValueError(f'field: the batch has no {self.field!r}; it has {", ".join(batch)}')
        call = self._bind_function(rng)
        if self._seeds_global:
            with global_random.restore_after():
                results = map_rows(self._seeding(call, rng), batch, self.field)
        else:
            results = map_rows(self._checking(call), batch, self.field)
        if self.field is None:
            return stack_examples(results)
        return {**batch, self.field: _stack(self.field, results)}

    def _bind_function(self, rng: ExampleRng) -> _Call:
        """Returns `fn` as a function of a value, or an example, and its row."""
        # Once per batch: inspecting a signature takes longer than most transforms.
        if 'albumentations' in _packages(self.fn):
            return lambda value, row: self._call_albumentations(value, rng.generator(row))
        if wants_rng(self.fn):
            return lambda value, row: self.fn(value, rng=rng.generator(row))
        return lambda value, row: self.fn(value)

    def _call_albumentations(self, value: Any, generator: np.random.Generator) -> Any:
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


def map_rows(call: _Call, batch: Arrays, field: str | None = None) -> list[Any]:
    """Returns the results of a function for the rows of a batch, in order.

    Args:
        call: called with an example, or with the value of its `field`, and the row.
        batch: arrays (n, ...).
        field: the field whose values are passed; None for whole examples.
    """
    if field is not None:
        return [call(value, row) for row, value in enumerate(batch[field])]
    rows = len(next(iter(batch.values())))
    return [call({name: x[row] for name, x in batch.items()}, row) for row in range(rows)]


def stack_examples(examples: list[Any]) -> Arrays:
    """Returns examples, dicts of values, as a batch.

    Raises:
        TypeError: if one of them is not a dict.
        ValueError: if they differ in fields or shapes.
    """
    for example in examples:
        if not isinstance(example, Mapping):
            raise TypeError(
                f'a function of an example must return a dict, got {type(example).__name__}. If it '
                "is a function of one field, name that field: PerExample(fn=..., field='image')"
            )
        if example.keys() != examples[0].keys():
            raise ValueError(
                'all examples need the same fields; a function of an example returned '
                f'{sorted(examples[0])}, then {sorted(example)}'
            )
    return {name: _stack(name, [example[name] for example in examples]) for name in examples[0]}


def _stack(name: str, values: list[Any]) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    for value, array in zip(values, arrays, strict=True):
        if value is None:
            raise TypeError(f'{name!r}: the function returned None; expected an array')
        if array.shape != arrays[0].shape:
            raise ValueError(
                f'{name!r} has shape {arrays[0].shape} in one example and {array.shape} in '
                'another; all examples of a batch need one shape: crop, resize or pad them'
            )
    return np.stack(arrays)


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
