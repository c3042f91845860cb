# SPDX-License-Identifier: Apache-2.0
"""Which learning rates an optimizer has: what is logged of it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.config import objects, paths, targets
from trainer.config.errors import UserError
from trainer.config.sections import Node

Schedule = Callable[[Any], Any]

# What scales an update, and by which argument.
_SCALES = (('scale', 'step_size'), ('scale_by_schedule', 'step_size_fn'))

# Where something stands below a node.
Place = tuple[str | int, ...]

# Whose learning rate is a bound: each step computes a smaller one from the loss.
_BOUNDED = (':momo', ':momo_adam')

# Whose learning rate is 1 unless given; a line search scales that (see `step_sizes`).
_LINE_SEARCHED = ':lbfgs'

# Optimizers for some of the parameters each: what their parts do is not done one after the other.
_PARTITIONS = (':multi_transform', ':partition', ':masked')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rate:
    """A learning rate: the product of what stands at some places below an optimizer's node.

    Attributes:
        owner: where the optimizer stands that has it.
        places: where it stands; none if the target has it by default.
        default: that default.
        sign: -1 for factors of an update, which a descent has negative.
        every: number of calls that make one update of the optimizer that has it.
    """

    owner: paths.Keys
    places: tuple[paths.Keys, ...] = ()
    default: float = 1.0
    sign: int = 1
    every: int = 1

    def schedule(self, node: Node, path: str) -> Schedule:
        """Returns it as a function of the number of calls, from a node whose schedules are made."""
        first = self.sign * self.default
        parts = [_as_schedule(paths.get(node, p), f'{path}.{paths.join(p)}') for p in self.places]
        if len(parts) == 1 and (self.sign, self.every) == (1, 1):
            return parts[0]

        def product(count: Any) -> Any:
            rate = first
            for part in parts:
                rate = rate * part(count // self.every)
            return rate

        return product


def made(node: Node, path: str) -> tuple[Node, Schedule | dict[str, Schedule] | None]:
    """Returns an optimizer's node with its schedules made, and the learning rates among them.

    These are functions of the number of calls, which is that of updates for any optimizer that
    makes one of each (`optax:apply_if_finite` counts those that it makes). Several, as of
    `optax:multi_transform`, are named by where they stand; None if there is none that is known.

    Args:
        node: names the optimizer; its targets and their arguments are checked already.
        path: where it stands, for messages.

    Raises:
        UserError: if one is neither a number nor a function of one argument.
    """
    found = list(_named(node, [], path)) or _factors(node, path)
    for keys in (keys for rate in found for keys in rate.places):
        value = paths.get(node, keys)
        if isinstance(value, Mapping):
            # One schedule object for the optimizer and for the logged value.
            value = targets.instantiate(value, f'{path}.{paths.join(keys)}')
            node = paths.changed(node, keys, value)
    schedules = [rate.schedule(node, path) for rate in found]
    if len(found) < 2:
        return node, next(iter(schedules), None)
    return node, dict(zip(_names([rate.owner for rate in found]), schedules, strict=True))


def _named(node: Any, keys: paths.Keys, path: str) -> Iterator[_Rate]:
    """Yields the arguments `learning_rate` of the targets below a node."""
    if not isinstance(node, Mapping) or 'target' not in node:
        for key, value in items(node):
            yield from _named(value, [*keys, key], path)
        return
    if str(node['target']).endswith(_BOUNDED):
        return
    known, names = parameters(node, path)
    at = next((k for k, name in names.items() if name == 'learning_rate'), None)
    if at is not None and paths.get(node, list(at)) is not None:
        yield _Rate(owner=keys, places=([*keys, *at],))
        return
    default = known['learning_rate'].default if 'learning_rate' in known else None
    if default is None and str(node['target']).endswith(_LINE_SEARCHED):
        yield _Rate(owner=keys, default=1.0)
        return
    if at is None and default is not None and _is_number(default):
        yield _Rate(owner=keys, default=default)
        return
    every = _calls_for_an_update(node, names)
    if every is None:
        return
    for key, value in items(node):
        for rate in _named(value, [*keys, key], path):
            yield dataclasses.replace(rate, every=rate.every * every)


def _factors(node: Any, path: str) -> list[_Rate]:
    """Returns the rate of a chain that has one by `optax:scale_by_schedule` alone, if it does."""
    found = list(_scales(node, [], path))
    if not any(scheduled for _, scheduled, _ in found):
        return []
    places = tuple(keys for keys, *_ in found)
    return [_Rate(owner=[], places=places, sign=-1, every=found[0][2])]


def _scales(node: Any, keys: paths.Keys, path: str) -> Iterator[tuple[paths.Keys, bool, int]]:
    """Yields the factors below a node: where, whether it is a schedule, and calls for an update."""
    every = 1
    if isinstance(node, Mapping) and 'target' in node:
        _, names = parameters(node, path)
        target = str(node['target'])
        for at, name in names.items():
            if (target.rpartition(':')[2], name) in _SCALES:
                yield [*keys, *at], name == 'step_size_fn', 1
                return
        counted = _calls_for_an_update(node, names)
        if counted is None or target.endswith(_PARTITIONS):
            return
        every = counted
    for key, value in items(node):
        for found, scheduled, inner in _scales(value, [*keys, key], path):
            yield found, scheduled, inner * every


def items(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the direct children of a node, with their keys."""
    if isinstance(node, Mapping):
        yield from node.items()
    elif type(node) in (tuple, list):
        yield from enumerate(node)


def parameters(
    node: Mapping[str, Any], path: str
) -> tuple[Mapping[str, inspect.Parameter], dict[Place, str]]:
    """Returns the parameters of a node's target, and the name of what stands at each place."""
    known, _ = targets.arguments(objects.resolve(node['target'], f'{path}.target'))
    by_position = [p.name for p in known.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    names: dict[Place, str] = {
        ('args', index): name
        for index, (name, _) in enumerate(zip(by_position, node.get('args', ()), strict=False))
    }
    names.update({(key,): key for key in node if key not in targets.RESERVED})
    return known, names


def _calls_for_an_update(node: Mapping[str, Any], names: Mapping[Place, str]) -> int | None:
    """Returns how many calls of an optimizer make an update, None if that changes."""
    if not str(node['target']).endswith(':MultiSteps'):
        return 1
    at = next((k for k, name in names.items() if name == 'every_k_schedule'), None)
    every = None if at is None else paths.get(node, list(at))
    return every if isinstance(every, int) else None


def _names(places: list[paths.Keys]) -> list[str]:
    """Returns what tells places apart: 'head' and 'body' of 'parts.head' and 'parts.body'."""
    every = [list(map(str, keys)) for keys in places]
    first = _common(every)
    last = _common([keys[first:][::-1] for keys in every])
    return ['.'.join(keys[first : len(keys) - last]) for keys in every]


def _common(rows: list[list[str]]) -> int:
    """Returns the number of items that all rows begin with."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _as_schedule(value: Any, where: str) -> Schedule:
    if callable(value):
        try:
            inspect.signature(value).bind(0)
        except TypeError as error:
            raise UserError(
                f'{where}: {value!r} is no schedule, which is a function of the number of updates '
                f'({error}). What makes a schedule is named by target=..., with its arguments'
            ) from error
        except ValueError:
            pass  # It does not tell.
        return value
    if _is_number(value):
        return lambda count: value
    raise UserError(
        f'{where}: expected a number or a schedule, a function of the number of updates; got '
        f'{type(value).__name__} {value!r:.200}'
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, numbers.Number) or getattr(value, 'shape', None) == ()
