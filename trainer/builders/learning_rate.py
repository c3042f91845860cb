# SPDX-License-Identifier: Apache-2.0
"""Builds the learning rates of an optimizer that are logged: its own, and those named by key.

Learning rates of nested optimizers, as in `optax:chain`, are not searched for: the user names them
in `config.log.learning_rates`.
"""

from __future__ import annotations

import inspect
import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from trainer.builders import nodes
from trainer.config import paths, targets
from trainer.config.errors import UserError
from trainer.config.sections import Node

Schedule = Callable[[Any], Any]

# Optimizers whose learning rate is an upper bound: each step computes the actual one from the loss.
_BOUNDED = (':momo', ':momo_adam')

# Optimizers whose learning rate is 1 by default; a line search scales it (see `step_sizes`).
_LINE_SEARCHED = ':lbfgs'

_KEY = 'config.log.learning_rates'


def build_rates(
    node: Node, path: str, named: Sequence[str] = ()
) -> tuple[Node, Schedule | dict[str, Schedule] | None]:
    """Returns an optimizer's node with its schedules built, and the learning rates to log.

    The rates are functions of the number of calls, which equals that of updates for optimizers
    that make one update per call (`optax:apply_if_finite` counts the updates it makes). Several
    rates are a dict, named by the parts in which their key paths differ; None if there is none.

    Args:
        node: the optimizer's node; its targets and their arguments have been checked.
        path: config path of the optimizer, for messages.
        named: key paths of other learning rates below it, such as 'args[1].learning_rate'.

    Raises:
        UserError: if a rate is neither a number nor a function of one argument, or does not exist.
    """
    node, own = _build_outer(node, path)
    rates: list[tuple[paths.Keys, Schedule]] = [] if own is None else [([], own)]
    for name in named:
        try:
            keys = paths.parse(name)
            value = paths.get(node, keys)
        except (UserError, KeyError, IndexError, TypeError) as error:
            raise UserError(f'{_KEY}: {path} has no {name!r}') from error
        node, schedule = _build_schedule(node, keys, value, path)
        every = _calls_per_update(node, keys, path)
        rates.append((nodes.owner(keys), _to_call_counts(schedule, every)))
    # A single rate has no name in a row: 'learning_rate'.
    if len(rates) < 2:
        return node, next((rate for _, rate in rates), None)
    names = _names([keys for keys, _ in rates])
    if len(set(names)) < len(names):
        raise UserError(
            f'{_KEY}: {", ".join(named)} name one optimizer twice, or the optimizer itself, whose '
            'learning rate is logged anyway; remove one of them'
        )
    return node, dict(zip(names, (rate for _, rate in rates), strict=True))


def _build_outer(node: Node, path: str) -> tuple[Node, Schedule | None]:
    """Builds the argument `learning_rate` of the outermost target; returns the new node and it."""
    if str(node['target']).endswith(_BOUNDED):
        return node, None
    known, names = nodes.parameters(node, path)
    at = next((list(k) for k, name in names.items() if name == 'learning_rate'), None)
    if at is not None and (value := paths.get(node, at)) is not None:
        return _build_schedule(node, at, value, path)
    # Not in the config: the rate is the default of the optimizer's signature, if that is a number.
    default = known['learning_rate'].default if 'learning_rate' in known else None
    if default is None and str(node['target']).endswith(_LINE_SEARCHED):
        return node, optax.constant_schedule(1.0)
    is_used = at is None and _is_number(default)
    return node, optax.constant_schedule(default) if is_used else None


def _build_schedule(node: Node, keys: paths.Keys, value: Any, path: str) -> tuple[Node, Schedule]:
    """Builds the schedule at a key path: one object for both the optimizer and the log."""
    where = f'{path}.{paths.join(keys)}'
    if isinstance(value, Mapping):
        value = targets.instantiate(value, where)
        node = paths.with_value(node, keys, value)
    return node, _as_schedule(value, where)


def _to_call_counts(schedule: Schedule, every: int) -> Schedule:
    """Converts a schedule of updates to one of calls, `every` of which make an update."""
    return schedule if every == 1 else lambda count: schedule(count // every)


def _calls_per_update(node: Node, keys: paths.Keys, path: str) -> int:
    """Returns the number of calls per update of the optimizer around a key path.

    Raises:
        UserError: if the number changes during the run.
    """
    # The product over all optax:MultiSteps above the key path, which can be nested.
    every = 1
    for depth in range(len(keys)):
        outer = paths.get(node, keys[:depth])
        if not isinstance(outer, Mapping) or not str(outer.get('target')).endswith(':MultiSteps'):
            continue
        _, names = nodes.parameters(outer, path)
        at = next((list(k) for k, name in names.items() if name == 'every_k_schedule'), None)
        steps = None if at is None else paths.get(outer, at)
        if not isinstance(steps, int):
            raise UserError(
                f'{_KEY}: {path}.{paths.join(keys)} is inside an optax:MultiSteps whose number of '
                'steps changes, so the number of its updates is unknown'
            )
        every *= steps
    return every


def _names(key_paths: list[paths.Keys]) -> list[str]:
    """Returns the differing parts of key paths: 'head' and 'body' for 'a.head' and 'a.body'."""
    parts = [list(map(str, keys)) for keys in key_paths]
    first = _common_length(parts)
    # The common end is that of the rest: an item must not be removed from both sides.
    last = _common_length([keys[first:][::-1] for keys in parts])
    return ['.'.join(keys[first : len(keys) - last]) or 'top' for keys in parts]


def _common_length(lists: list[list[str]]) -> int:
    """Returns the length of the common prefix of some lists."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _as_schedule(value: Any, where: str) -> Schedule:
    if callable(value):
        try:
            inspect.signature(value).bind(0)
        except TypeError as error:
            raise UserError(
                f'{where}: {value!r} is not a schedule, a function of the number of updates '
                f'({error}). Name a function that returns a schedule as target=..., with its '
                'arguments'
            ) from error
        except ValueError:
            pass  # Some builtins have no signature.
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
