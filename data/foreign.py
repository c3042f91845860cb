# SPDX-License-Identifier: Apache-2.0
"""Accepts the transform objects of Grain where this package expects functions.

They are recognized by their method and not by their class: importing Grain takes seconds, and its
classes have had several names (`grain.MapTransform`, `grain.transforms.Map`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from .nested import Tree
from .order import combine
from .per_example import map_rows, stack_examples
from .rng import ExampleRng

# Methods of Grain's classes. The first three keep the number of examples.
_METHODS = ('map', 'random_map', 'map_with_index', 'filter', 'flat_map')
_CLASSES = {'filter': 'Filter', 'flat_map': 'FlatMap'}


@dataclasses.dataclass(frozen=True)
class GrainMap:
    """A `Map`, `RandomMap` or `MapWithIndex` of Grain as a transform of batches.

    Attributes:
        transform: the object of Grain. It is called with one example at a time.
        method: the name of its method.
    """

    transform: Any
    method: str

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the stacked results.

        A `RandomMap` gets the example's numpy generator, a `MapWithIndex` the example's index in
        the source (in a stream, its position).
        """
        run = getattr(self.transform, self.method)

        def call(example: Any, row: int) -> Any:
            if self.method == 'random_map':
                return run(example, rng.generator(row))
            if self.method == 'map_with_index':
                return run(int(rng.ids[row]), example)
            return run(example)

        return stack_examples(map_rows(call, batch), batch)


def as_transforms(transforms: Sequence[Any]) -> tuple[Callable[..., Tree], ...]:
    """Returns transforms as functions of batches.

    Args:
        transforms: functions of batches, and objects of Grain.

    Raises:
        ValueError: for an object that is neither, or one that changes the number of examples.
    """
    return tuple(_as_transform(transform, i) for i, transform in enumerate(transforms))


def _as_transform(transform: Any, position: int) -> Callable[..., Tree]:
    name, method = type(transform).__name__, grain_method(transform)
    if method in _CLASSES:
        raise ValueError(
            f'transforms[{position}]: {name} is a {_CLASSES[method]} of Grain, which changes the '
            'number of examples. It is a stage of a stream: use '
            "config.data.loader.target='trainer.data.streaming:StreamLoader', and put it in "
            'config.data.loader.stages'
        )
    if method is not None:
        return GrainMap(transform, method)
    if isinstance(transform, type) or not callable(transform):
        raise ValueError(
            f'transforms[{position}]: expected a function of a batch, or a Map or RandomMap of '
            f'Grain; got {transform!r:.100}'
        )
    if needs_key(transform):
        raise ValueError(
            f'transforms[{position}]: {transform!r:.100} needs a JAX key, which transforms on the '
            'devices get: move it to device_transforms, or take a numpy generator as `rng`'
        )
    return transform


def as_stage(stage: Any, *, seed: int, number: int, part: tuple[int, int], epoch: int) -> Any:
    """Returns a stage of a stream as a function of a `grain.IterDataset`.

    Args:
        stage: such a function, or an object of Grain.
        seed: the data seed.
        number: index of the stage.
        part: (index, count) of the reader.
        epoch: number of the pass.

    Raises:
        TypeError: for an object that is neither.
    """
    method = grain_method(stage)
    if method is None and callable(stage):
        return stage
    if method is None:
        raise TypeError(
            f'stages[{number}] = {stage!r:.100}: expected a function of a grain.IterDataset, or a '
            'Map, RandomMap, Filter or FlatMap of Grain'
        )
    # Each reader, pass and stage draws its own numbers. Grain counts the examples, and its count is
    # part of the stream's state.
    own = int(combine(seed, number, epoch, *part)) % 2**32
    run = getattr(stage, method)

    def apply(dataset: Any) -> Any:
        if method == 'flat_map':
            import grain.python as grain

            return grain.experimental.FlatMapIterDataset(dataset, stage)
        more = {'seed': own} if method == 'random_map' else {}
        return getattr(dataset, method)(run, **more)

    return apply


def grain_method(value: Any) -> str | None:
    """Returns the method of a transform object of Grain that processes an example.

    None for anything else. A function of batches may have a method with such a name, so objects
    that can be called are Grain's only if a base class is.
    """
    bases = type(value).__mro__
    if isinstance(value, type):
        return None
    if callable(value) and not any(base.__module__.partition('.')[0] == 'grain' for base in bases):
        return None
    return next((name for name in _METHODS if callable(getattr(value, name, None))), None)


def needs_key(transform: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `key` without a default: a random key of JAX."""
    try:
        parameter = inspect.signature(transform).parameters.get('key')
    except ValueError:  # Functions implemented in C may have no signature.
        return False
    return parameter is not None and parameter.default is parameter.empty
