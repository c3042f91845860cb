# SPDX-License-Identifier: Apache-2.0
"""Adjusts learning rate schedules when a run resumes with a different batch size.

Optax's schedules are functions of the number of updates. If the durations of a schedule are epochs,
examples or percentages of the run, it is called with the number of examples consumed, in batches of
the current size, instead of the number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.builders import nodes
from trainer.config import durations, paths
from trainer.config.durations import Clock, Duration
from trainer.config.errors import UserError
from trainer.config.sections import Node

# Names of optimizer arguments that are learning rates.
_RATES = ('learning_rate', 'step_size_fn')
# Parts of the names of schedule arguments that count updates.
_COUNTS = ('step', 'begin', 'boundar')


def find_schedules(node: Node, path: str, clock: Clock) -> list[paths.Keys]:
    """Returns the key paths of an optimizer's schedules that count examples.

    Args:
        node: the optimizer's node, with durations as given in the config.
        path: config path of the optimizer, for messages.
        clock: the clock of a run whose batch size has changed.

    Raises:
        UserError: naming the key to set, if a duration cannot be counted in examples.
    """
    return list(_find_schedules(node, [], path, clock))


def shift_schedules(node: Node, schedules: list[paths.Keys], clock: Clock) -> Node:
    """Returns an optimizer's node in which the schedules at these key paths count examples."""
    if clock.progress is None:
        return node
    ahead = clock.progress.offset
    # An integer where possible, since a schedule may use its argument as an index.
    by = ahead.numerator if ahead.denominator == 1 else float(ahead)
    for keys in schedules:
        schedule = paths.get(node, keys)
        wrapped = {'target': 'trainer.step.schedules:shift', 'schedule': schedule, 'by': by}
        node = paths.with_value(node, keys, wrapped)
    return node


def _find_schedules(value: Any, keys: paths.Keys, path: str, clock: Clock) -> Iterator[paths.Keys]:
    if _counts_examples(value):
        raise UserError(
            f'{path}.{paths.join(keys)}: {value!r} is a different number of steps now that '
            'config.data.batch_size has changed, and only learning rate schedules can be adjusted; '
            'write it in steps'
        )
    if isinstance(value, Mapping) and 'target' in value:
        _, names = nodes.parameters(value, f'{path}.{paths.join(keys)}'.rstrip('.'))
    else:
        names = {}
    # A learning rate is wrapped as a whole, so the search does not go into it. Anything else that
    # counts examples, at any depth, is an error.
    for at, item in _children(value):
        inner = [*keys, *at]
        if names.get(at) in _RATES and isinstance(item, Mapping):
            if _check_schedule(item, inner, path, clock):
                yield inner
        else:
            yield from _find_schedules(item, inner, path, clock)


def _check_schedule(schedule: Any, keys: paths.Keys, path: str, clock: Clock) -> bool:
    """Returns whether a schedule counts examples.

    Raises:
        UserError: if some of its durations count examples and others steps.
    """
    leaves = list(_leaves(schedule, keys, ''))
    where = next((at for at, _, value in leaves if _counts_examples(value)), None)
    if where is None:
        return False
    counts_examples = f'{path}.{paths.join(where)}'
    for at, name, value in leaves:
        count = _updates(name, value)
        # 0 steps are 0 examples, too.
        if count:
            examples = math.ceil(clock.batches(count) * clock.batch_size)
            raise UserError(
                f'{path}.{paths.join(at)}: {value!r} counts steps, and {counts_examples} counts '
                'examples. Now that config.data.batch_size has changed, a schedule cannot mix the '
                f"two. Write '{examples} examples', the number consumed by step {count:,}"
            )
    return True


def _counts_examples(value: Any) -> bool:
    return durations.is_duration(value) and Duration.parse(value, zero=True).unit not in (
        'steps',
        'never',
    )


def _updates(name: str, value: Any) -> int:
    """Returns the number of updates that a leaf of a schedule means; 0 if it is not a count."""
    if durations.is_duration(value):
        duration = Duration.parse(value, zero=True)
        return math.ceil(duration.value) if duration.unit == 'steps' else 0
    # A plain integer: only the argument's name shows whether it counts updates.
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and any(word in name for word in _COUNTS) else 0


def _leaves(value: Any, keys: paths.Keys, name: str) -> Iterator[tuple[paths.Keys, str, Any]]:
    """Yields (key path, argument name, value) of each leaf of a schedule, and of numeric keys."""
    names: dict[nodes.KeyPath, str] = {}
    if isinstance(value, Mapping) and 'target' in value:
        _, names = nodes.parameters(value, paths.join(keys))
    for at, item in _children(value):
        key, where = at[-1], [*keys, *at]
        is_argument = at in names or isinstance(value, tuple | list)
        if not is_argument and (isinstance(key, int) or durations.is_duration(key)):
            # A dict of boundaries: its keys count updates, its values do not.
            yield where, 'boundaries', key
            inner = ''
        else:
            inner = names.get(at) or (key if isinstance(key, str) else name)
        if isinstance(item, Mapping | tuple | list):
            yield from _leaves(item, where, inner)
        else:
            yield where, inner, item


def _children(value: Any) -> Iterator[tuple[nodes.KeyPath, Any]]:
    """Yields the direct children of a node, with each positional argument as a child."""
    for key, item in nodes.items(value):
        if key == 'args' and 'target' in value:
            yield from (((key, index), each) for index, each in enumerate(item))
        else:
            yield (key,), item
