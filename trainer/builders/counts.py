# SPDX-License-Identifier: Apache-2.0
"""Checks and converts step counts in `config.optimizer`, including integer keys given as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.builders import nodes
from trainer.config import paths
from trainer.config.errors import UserError
from trainer.config.sections import Node

# Annotations of dicts whose keys are integers.
_INTEGER_KEYS = re.compile(r'\b(?:dict|Dict|Mapping)\[int\b')

# Lengths of optax schedules that must not be 0: with 0 the schedule would keep its first value
# forever. Inside `join_schedules` 0 is allowed, because a boundary of 0 skips the schedule.
_AT_LEAST_ONE = (
    (':warmup_constant_schedule', 'warmup_steps'),
    (':linear_schedule', 'transition_steps'),
    (':polynomial_schedule', 'transition_steps'),
    (':exponential_decay', 'transition_steps'),
    (':MultiSteps', 'every_k_schedule'),
    (':reduce_on_plateau', 'accumulation_size'),
)
_JOINED = ':join_schedules'

# Arguments of `reduce_on_plateau` that count averages of several steps, not steps.
_COUNT_MEANS = ('patience', 'cooldown')


def with_integer_keys(node: Node, path: str) -> Node:
    """Returns an optimizer's node with keys such as '30' converted where integers are expected.

    In JSON, and so on the command line, all keys are strings.

    Raises:
        UserError: if a dict has both '30' and 30.
    """
    for keys, name, value in _arguments(node, path):
        # By the annotation of the argument: keys of other dicts, such as labels, stay strings.
        if not isinstance(value, Mapping) or not _has_integer_keys(node, keys, name, path):
            continue
        converted: dict[Any, Any] = {}
        for key, item in value.items():
            number = int(key) if isinstance(key, str) and key.strip().isdecimal() else key
            if number in converted:
                where = f'{path}.{paths.join(keys)}'
                raise UserError(f'{where}: step {number} is given twice; remove one of them')
            converted[number] = item
        node = paths.with_value(node, keys, converted)
    return node


def check(node: Node, steps: Mapping[str, int], path: str) -> None:
    """Checks lengths that were given as durations.

    Args:
        node: the optimizer's node; durations have been converted to steps.
        steps: steps of each duration, by config path.
        path: config path of the node.

    Raises:
        UserError: for a length of 0 where at least one step is needed, and for a duration where
            something other than steps is counted.
    """
    _check_inner_counts(node, steps, path)
    for keys, name, value in _arguments(node, path):
        where = f'{path}.{paths.join(keys)}'
        owner = paths.get(node, nodes.owner(keys))
        target = str(owner['target'])
        is_needed = any(target.endswith(kind) and name == of for kind, of in _AT_LEAST_ONE)
        # Only for durations, such as '1%' of a short run: a literal 0 is what the user wrote.
        if value == 0 and where in steps and is_needed and not _is_joined(node, keys):
            raise UserError(
                f'{where} is 0 steps, but {target} needs at least 1: with 0 it would keep its '
                'first value forever. Make it longer, or remove this schedule'
            )
        counts_means = target.endswith(':reduce_on_plateau') and name in _COUNT_MEANS
        if counts_means and where in steps and owner.get('accumulation_size', 1) != 1:
            raise UserError(
                f'{where}: durations are converted to steps, but with accumulation_size {target} '
                f'counts averages over that many steps. Give a number, such as {name}=5'
            )


def _check_inner_counts(node: Any, steps: Mapping[str, int], path: str) -> None:
    """Checks that no duration is inside optax:MultiSteps, where updates are counted, not steps."""
    if isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            _check_inner_counts(value, steps, f'{path}[{index}]')
    if not isinstance(node, Mapping):
        return
    if str(node.get('target')).endswith(':MultiSteps'):
        below = [where for where in steps if where.startswith(f'{path}.')]
        # `every_k_schedule` itself is outside: it is a number of steps.
        inner = [where for where in below if where != f'{path}.every_k_schedule']
        if inner:
            raise UserError(
                f'{inner[0]}: durations are converted to training steps, but optax:MultiSteps '
                'makes one update per several steps, and the optimizer inside counts updates. Use '
                'config.accumulate instead, or give the number of updates'
            )
    for key, value in node.items():
        _check_inner_counts(value, steps, f'{path}.{key}')


def _arguments(node: Any, path: str) -> Iterator[tuple[paths.Keys, str, Any]]:
    """Yields (key path, name, value) of each argument of all targets below a node."""
    for keys, inner in nodes.walk(node):
        if isinstance(inner, Mapping) and 'target' in inner:
            _, names = nodes.parameters(inner, path)
            for at, name in names.items():
                yield [*keys, *at], name, paths.get(inner, list(at))


def _has_integer_keys(node: Node, keys: paths.Keys, name: str, path: str) -> bool:
    known, _ = nodes.parameters(paths.get(node, nodes.owner(keys)), path)
    return name in known and _INTEGER_KEYS.search(str(known[name].annotation)) is not None


def _is_joined(node: Node, keys: paths.Keys) -> bool:
    """Whether a schedule is inside `optax:join_schedules`."""
    above = [paths.get(node, keys[:depth]) for depth in range(len(nodes.owner(keys)))]
    return any(
        isinstance(each, Mapping) and str(each.get('target')).endswith(_JOINED) for each in above
    )
