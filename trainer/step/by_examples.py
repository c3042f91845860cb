# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules of a run that goes on in batches of another size.

Optax's schedules are functions of the number of updates. One whose durations are epochs, examples
or parts of the run is one of the examples, in batches of the present size; so it is called with
what the run has consumed, in such batches, in the place of its updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import durations, paths
from trainer.config.durations import Clock, Duration
from trainer.config.errors import UserError
from trainer.config.sections import Node
from trainer.step import rates

# The arguments of optimizers that are learning rates.
_RATES = ('learning_rate', 'step_size_fn')
# How the arguments of schedules are called that count updates.
_COUNTS = ('step', 'begin', 'boundar')


def found(node: Node, path: str, clock: Clock) -> list[paths.Keys]:
    """Returns where the schedules of an optimizer are that count examples.

    Args:
        node: names the optimizer, durations as they were given.
        path: its config path.
        clock: of a run that has had other batch sizes.

    Raises:
        UserError: naming the key to set, if a duration cannot be counted in examples.
    """
    return list(_found(node, [], path, clock))


def moved(node: Node, schedules: list[paths.Keys], clock: Clock) -> Node:
    """Returns an optimizer's node whose schedules at these places count examples."""
    if clock.progress is None:
        return node
    ahead = clock.progress.ahead
    # As an integer where it is one: a schedule may read a table.
    by = ahead.numerator if ahead.denominator == 1 else float(ahead)
    for keys in schedules:
        schedule = paths.get(node, keys)
        wrapped = {'target': 'trainer.step.schedules:moved', 'schedule': schedule, 'by': by}
        node = paths.changed(node, keys, wrapped)
    return node


def _found(value: Any, keys: paths.Keys, path: str, clock: Clock) -> Iterator[paths.Keys]:
    if _counts_examples(value):
        raise UserError(
            f'{path}.{paths.join(keys)}: {value!r} is another number of steps now that '
            'config.data.batch_size has changed, and it is no part of a learning rate, which could '
            'follow; write it in steps'
        )
    if isinstance(value, Mapping) and 'target' in value:
        _, names = rates.parameters(value, f'{path}.{paths.join(keys)}'.rstrip('.'))
    else:
        names = {}
    for at, item in _items(value):
        inner = [*keys, *at]
        if names.get(at) in _RATES and isinstance(item, Mapping):
            if _check_schedule(item, inner, path, clock):
                yield inner
        else:
            yield from _found(item, inner, path, clock)


def _check_schedule(schedule: Any, keys: paths.Keys, path: str, clock: Clock) -> bool:
    """Whether a schedule counts examples.

    Raises:
        UserError: if a part of it counts steps.
    """
    leaves = list(_leaves(schedule, keys, ''))
    where = next((at for at, _, value in leaves if _counts_examples(value)), None)
    if where is None:
        return False
    example = f'{path}.{paths.join(where)}'
    for at, name, value in leaves:
        count = _updates(name, value)
        if count:
            examples = math.ceil(clock.batches(count) * clock.batch_size)
            raise UserError(
                f'{path}.{paths.join(at)}: {value!r} counts steps, and {example} counts examples. '
                'Now that config.data.batch_size has changed, one schedule cannot count both. '
                f"Write '{examples} examples', which is what the run consumes by step {count:,}"
            )
    return True


def _counts_examples(value: Any) -> bool:
    return durations.is_duration(value) and Duration.parse(value).unit not in ('steps', 'never')


def _updates(name: str, value: Any) -> int:
    """Returns how many updates a leaf of a schedule counts; 0 if it counts none."""
    if durations.is_duration(value):
        given = Duration.parse(value)
        return math.ceil(given.value) if given.unit == 'steps' else 0
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and any(word in name for word in _COUNTS) else 0


def _leaves(value: Any, keys: paths.Keys, name: str) -> Iterator[tuple[paths.Keys, str, Any]]:
    """Yields each leaf of a schedule, and each key that is no name: where, of what, and it."""
    names: dict[rates.Place, str] = {}
    if isinstance(value, Mapping) and 'target' in value:
        _, names = rates.parameters(value, paths.join(keys))
    for at, item in _items(value):
        key, where = at[-1], [*keys, *at]
        is_argument = at in names or isinstance(value, tuple | list)
        if not is_argument and (isinstance(key, int) or durations.is_duration(key)):
            # Of a table, whose keys count and whose values do not.
            yield where, 'boundaries', key
            inner = ''
        else:
            inner = names.get(at) or (key if isinstance(key, str) else name)
        if isinstance(item, Mapping | tuple | list):
            yield from _leaves(item, where, inner)
        else:
            yield where, inner, item


def _items(value: Any) -> Iterator[tuple[rates.Place, Any]]:
    """Yields what is directly below a node; positional arguments one by one."""
    for key, item in rates.items(value):
        if key == 'args' and 'target' in value:
            yield from (((key, index), each) for index, each in enumerate(item))
        else:
            yield (key,), item
