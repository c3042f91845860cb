# SPDX-License-Identifier: Apache-2.0
"""The learning rates of an optimizer that are logged: its own, and those that the config names."""

from __future__ import annotations

import inspect
import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optax

from trainer.config import objects, paths, targets
from trainer.config.errors import UserError
from trainer.config.sections import Node

Schedule = Callable[[Any], Any]

# Where something stands below a node.
Place = tuple[str | int, ...]

# Whose learning rate is a bound: each step computes a smaller one from the loss.
_BOUNDED = (':momo', ':momo_adam')

# Whose learning rate is 1 unless given; a line search scales that (see `step_sizes`).
_LINE_SEARCHED = ':lbfgs'

_KEY = 'config.log.learning_rates'


def made(
    node: Node, path: str, named: Sequence[str] = ()
) -> tuple[Node, Schedule | dict[str, Schedule] | None]:
    """Returns an optimizer's node with its schedules made, and the learning rates that are logged.

    These are functions of the number of calls, which is that of updates for any optimizer that
    makes one of each (`optax:apply_if_finite` counts those that it makes). Several are named by
    what tells their places apart; None if there is none.

    Args:
        node: names the optimizer; its targets and their arguments are checked already.
        path: where it stands, for messages.
        named: where other learning rates stand below it, such as 'args[1].learning_rate'.

    Raises:
        UserError: if one is neither a number nor a function of one argument, or does not exist.
    """
    node, own = _own(node, path)
    rates: list[tuple[paths.Keys, Schedule]] = [] if own is None else [([], own)]
    for name in named:
        try:
            keys = paths.parse(name)
            value = paths.get(node, keys)
        except (UserError, KeyError, IndexError, TypeError) as error:
            raise UserError(f'{_KEY}: {path} has no {name!r}') from error
        node, schedule = _at(node, keys, value, path)
        every = _calls_for_an_update(node, keys, path)
        # The optimizer that it is an argument of, by name or by position.
        owner = keys[:-2] if keys[-2:-1] == ['args'] else keys[:-1]
        rates.append((owner, _each(schedule, every)))
    if len(rates) < 2:
        return node, next((rate for _, rate in rates), None)
    names = _names([keys for keys, _ in rates])
    if len(set(names)) < len(names):
        raise UserError(
            f'{_KEY}: {", ".join(named)} name one optimizer twice, or the optimizer itself, whose '
            'learning rate is logged anyway; leave one out'
        )
    return node, dict(zip(names, (rate for _, rate in rates), strict=True))


def first_inside(node: Any, before: paths.Keys | None = None) -> str | None:
    """Returns where the first learning rate of an optimizer inside this one stands, or None."""
    before = before or []
    items: Any = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (tuple, list)):
        items = enumerate(node)
    for key, value in items:
        if before and key == 'learning_rate' and value is not None:
            return paths.join([*before, key])
        if found := first_inside(value, [*before, key]):
            return found
    return None


def _own(node: Node, path: str) -> tuple[Node, Schedule | None]:
    """Returns a node with its own schedule made, and that: of its argument `learning_rate`."""
    if str(node['target']).endswith(_BOUNDED):
        return node, None
    known, names = parameters(node, path)
    at = next((list(k) for k, name in names.items() if name == 'learning_rate'), None)
    if at is not None and (value := paths.get(node, at)) is not None:
        return _at(node, at, value, path)
    default = known['learning_rate'].default if 'learning_rate' in known else None
    if default is None and str(node['target']).endswith(_LINE_SEARCHED):
        return node, optax.constant_schedule(1.0)
    is_used = at is None and _is_number(default)
    return node, optax.constant_schedule(default) if is_used else None


def _at(node: Node, keys: paths.Keys, value: Any, path: str) -> tuple[Node, Schedule]:
    """Returns a node with the schedule at a place made: one for the optimizer and for the log."""
    where = f'{path}.{paths.join(keys)}'
    if isinstance(value, Mapping):
        value = targets.instantiate(value, where)
        node = paths.changed(node, keys, value)
    return node, _as_schedule(value, where)


def _each(schedule: Schedule, every: int) -> Schedule:
    """Returns a schedule of updates as one of calls, `every` of which make an update."""
    return schedule if every == 1 else lambda count: schedule(count // every)


def _calls_for_an_update(node: Node, keys: paths.Keys, path: str) -> int:
    """Returns how many calls make an update of the optimizer that has what stands at a place.

    Raises:
        UserError: if that changes.
    """
    every = 1
    for depth in range(len(keys)):
        outer = paths.get(node, keys[:depth])
        if not isinstance(outer, Mapping) or not str(outer.get('target')).endswith(':MultiSteps'):
            continue
        _, names = parameters(outer, path)
        at = next((list(k) for k, name in names.items() if name == 'every_k_schedule'), None)
        steps = None if at is None else paths.get(outer, at)
        if not isinstance(steps, int):
            raise UserError(
                f'{_KEY}: {path}.{paths.join(keys)} is in an optax:MultiSteps whose number of '
                'steps changes, so the number of its updates is not known'
            )
        every *= steps
    return every


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


def _names(places: list[paths.Keys]) -> list[str]:
    """Returns what tells places apart: 'head' and 'body' of 'parts.head' and 'parts.body'."""
    every = [list(map(str, keys)) for keys in places]
    first = _common(every)
    last = _common([keys[first:][::-1] for keys in every])
    return ['.'.join(keys[first : len(keys) - last]) or 'top' for keys in every]


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
        return optax.constant_schedule(value)
    raise UserError(
        f'{where}: expected a number or a schedule, a function of the number of updates; got '
        f'{type(value).__name__} {value!r:.200}'
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, numbers.Number) or getattr(value, 'shape', None) == ()
