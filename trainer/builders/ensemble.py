# SPDX-License-Identifier: Apache-2.0
"""From `config.ensemble` to who the members are."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.builders.optimizer import build_optimizer
from trainer.config import paths, suggest
from trainer.config.durations import Clock
from trainer.config.errors import UserError, shown
from trainer.config.sections import GroupSection, OptimizerSection, Sections
from trainer.ensemble.step import Ensemble
from trainer.step.optimizer import Optimizer

_VARY = 'config.ensemble.vary'
_OPTIMIZER = 'optimizer.'


def build_ensemble(sections: Sections, clock: Clock) -> Ensemble | None:
    """Returns the members that the config asks for, None if it trains one model.

    Raises:
        UserError: for what cannot vary among the members, or not in this way.
    """
    given = sections.ensemble
    if given is None:
        return None
    if given.size < 1:
        raise UserError(f'config.ensemble.size: expected at least 1, got {given.size}')
    if sections.surgery and sections.init_from is None:
        raise UserError(
            'config.ensemble: config.surgery of the fresh weights of several members is not '
            'possible; with config.init_from it is, of the weights that all of them start with'
        )
    seeds = tuple(sections.seed + member for member in range(given.size))
    values: dict[str, tuple[float, ...]] = {}
    for path, found in _by_path(given.vary).items():
        _check_values(path, found, given.size)
        if path == 'seed':
            seeds = tuple(found)
        elif path.startswith(_OPTIMIZER):
            values[path.removeprefix(_OPTIMIZER)] = tuple(found)
        else:
            raise UserError(
                f"{_VARY}: {path!r} cannot vary in one program; 'seed' can, and the numbers among "
                "the arguments of config.optimizer, such as 'optimizer.learning_rate'"
            )
    _check_seeds(seeds)
    for path in values:
        _check_path(sections.optimizer, path)
    made = functools.partial(_optimizer, sections, clock)
    for member in range(given.size if values else 0):
        made({path: each[member] for path, each in values.items()})  # It may refuse the number.
    return Ensemble(seeds=seeds, values=values, optimizer=made)


def _optimizer(sections: Sections, clock: Clock, values: Mapping[str, Any]) -> Optimizer:
    return build_optimizer(sections.optimizer, clock, values, sections.log.learning_rates)[0]


def _by_path(vary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves by their paths, such as 'optimizer.args[1].learning_rate'.

    Raises:
        UserError: if one path is there as a dotted key and as nested keys.
    """
    found: dict[str, Any] = {}
    for keys, value in _leaves(vary, []):
        path = paths.join(keys)
        if path in found:
            raise UserError(
                f'{_VARY}.{path} is given twice, {found[path]!r} and {value!r}: by a key with dots '
                'and by nested ones. Leave one of them out'
            )
        found[path] = value
    return found


def _leaves(node: Mapping[Any, Any], before: paths.Keys) -> Iterator[tuple[paths.Keys, Any]]:
    for key, value in node.items():
        keys = [*before, *([key] if isinstance(key, int) else paths.parse(key))]
        if isinstance(value, Mapping):
            yield from _leaves(value, keys)
        else:
            yield keys, value


def _check_values(path: str, values: Any, size: int) -> None:
    whole = path == 'seed'
    kind: type = numbers.Integral if whole else numbers.Real
    fits = isinstance(values, (tuple, list)) and len(values) == size
    if not fits or not all(isinstance(x, kind) and not isinstance(x, bool) for x in values):
        raise UserError(
            f'{_VARY}.{path}: expected a tuple of {size} {"integers" if whole else "numbers"}, one '
            f'for each member (config.ensemble.size), got {shown(values)}'
        )


def _check_seeds(seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        if not -(2**31) <= seed < 2**31:
            raise UserError(f'config.ensemble: the seed {seed} of a member has more than 32 bits')


def _check_path(optimizer: OptimizerSection, path: str) -> None:
    """Checks that a path below `config.optimizer` may be an argument of an optimizer."""
    section, keys = _owner(optimizer, path)
    own = {field.name for field in dataclasses.fields(section)} - {'node'}
    if keys[0] in own:
        raise UserError(
            f'{_VARY}: config.optimizer.{path} is no argument of an optimizer, and only those can '
            'vary'
        )
    inner: Any = section.node
    for key in keys[:-1]:
        inner = _at(inner, key)
        if not isinstance(inner, (Mapping, tuple, list)):
            raise UserError(
                f'{_VARY}: there is no config.optimizer.{path}: {key!r} is {inner!r} there'
            )
    there = _at(inner, keys[-1])
    if isinstance(there, Mapping) and 'target' in there:
        raise UserError(
            f'{_VARY}: config.optimizer.{path} is no number but {there["target"]}, which numbers '
            f'would replace. Vary one of its own arguments, config.optimizer.{path}.NAME, or the '
            'factor of trainer.schedules:scaled around it'
        )


def _owner(section: OptimizerSection, path: str) -> tuple[OptimizerSection | GroupSection, Any]:
    """Returns the section whose optimizer a path leads into, and the keys below it.

    Raises:
        UserError: if there are groups, and it leads into none of them.
    """
    keys = paths.parse(path)
    ours = {field.name for field in dataclasses.fields(section)} - {'node', 'groups'}
    if not section.groups or keys[0] in ours:
        return section, keys
    if keys[0] != 'groups':
        raise UserError(
            f'{_VARY}: with config.optimizer.groups each group has its own optimizer; vary '
            + ' or '.join(f'optimizer.groups.{name}.{path}' for name in section.groups)
        )
    if len(keys) > 2 and keys[1] in section.groups:
        return section.groups[keys[1]], keys[2:]
    name = str(keys[1]) if len(keys) > 1 else ''
    near = suggest.nearest(name, section.groups)
    raise UserError(
        f'{_VARY}: config.optimizer.{path} is no argument of the optimizer of a group. '
        + (
            f'Did you mean optimizer.{paths.join(["groups", near, *keys[2:]])}?'
            if near and near != name
            else f'The groups are {", ".join(section.groups)}'
        )
    )


def _at(node: Any, key: str | int) -> Any:
    try:
        return node[key]
    except (LookupError, TypeError):
        return None
