# SPDX-License-Identifier: Apache-2.0
"""Builds the ensemble of `config.ensemble`: seeds and hyperparameters of its members."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from trainer.builders.optimizer import build_optimizer
from trainer.config import paths, suggest
from trainer.config.durations import Clock
from trainer.config.errors import UserError, short_repr
from trainer.config.sections import GroupSection, OptimizerSection, Sections
from trainer.ensemble.step import Ensemble
from trainer.step.optimizer import Optimizer

_VARY = 'config.ensemble.vary'
_OPTIMIZER = 'optimizer.'


def build_ensemble(sections: Sections, clock: Clock) -> Ensemble | None:
    """Returns the ensemble, or None if the config trains a single model.

    Raises:
        UserError: for a value that cannot vary among the members, and for invalid values.
    """
    given = sections.ensemble
    if given is None:
        return None
    if given.size < 1:
        raise UserError(f'config.ensemble.size: expected at least 1, got {given.size}')
    if sections.surgery and sections.init_from is None:
        raise UserError(
            'config.ensemble: config.surgery is not supported for the initial weights of several '
            'members; use config.init_from to start all members from the same weights'
        )
    # Member i alone is the run with seed + i, so it can be reproduced without the others.
    seeds = tuple(sections.seed + member for member in range(given.size))
    values: dict[str, tuple[float, ...]] = {}
    for path, per_member in _flatten(given.vary).items():
        _check_values(path, per_member, given.size)
        if path == 'seed':
            seeds = tuple(per_member)
        elif path.startswith(_OPTIMIZER):
            values[path.removeprefix(_OPTIMIZER)] = tuple(per_member)
        else:
            raise UserError(
                f"{_VARY}: {path!r} cannot vary among members; 'seed' can, and so can numeric "
                "arguments of config.optimizer, such as 'optimizer.learning_rate'"
            )
    _check_seeds(seeds)
    for path in values:
        _check_path(sections.optimizer, path)
    build = functools.partial(_build_optimizer, sections, clock)
    # Build each member's optimizer once, so that an invalid value is reported here.
    for member in range(given.size if values else 0):
        build({path: each[member] for path, each in values.items()})
    return Ensemble(seeds=seeds, values=MappingProxyType(values), optimizer=build)


def _build_optimizer(sections: Sections, clock: Clock, values: Mapping[str, Any]) -> Optimizer:
    return build_optimizer(sections.optimizer, clock, values, sections.log.learning_rates)[0]


def _flatten(vary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves by key path, such as 'optimizer.args[1].learning_rate'.

    Raises:
        UserError: if a path is given both as a dotted key and as nested keys.
    """
    leaves: dict[str, Any] = {}
    for keys, value in _leaves(vary, []):
        path = paths.join(keys)
        if path in leaves:
            raise UserError(
                f'{_VARY}.{path} is given twice, {leaves[path]!r} and {value!r}: as a dotted key '
                'and as nested keys; remove one of them'
            )
        leaves[path] = value
    return leaves


def _leaves(node: Mapping[Any, Any], before: paths.Keys) -> Iterator[tuple[paths.Keys, Any]]:
    for key, value in node.items():
        keys = [*before, *([key] if isinstance(key, int) else paths.parse(key))]
        if isinstance(value, Mapping):
            yield from _leaves(value, keys)
        else:
            yield keys, value


def _check_values(path: str, values: Any, size: int) -> None:
    is_seed = path == 'seed'
    kind: type = numbers.Integral if is_seed else numbers.Real
    fits = isinstance(values, (tuple, list)) and len(values) == size
    # In Python, True is an integer.
    if not fits or not all(isinstance(x, kind) and not isinstance(x, bool) for x in values):
        expected = 'integers' if is_seed else 'numbers'
        raise UserError(
            f'{_VARY}.{path}: expected a tuple of {size} {expected}, one per member '
            f'(config.ensemble.size), got {short_repr(values)}'
        )


def _check_seeds(seeds: tuple[int, ...]) -> None:
    # The seeds of all members are one int32 array in the step.
    for seed in seeds:
        if not -(2**31) <= seed < 2**31:
            raise UserError(f"config.ensemble: a member's seed {seed} has more than 32 bits")


def _check_path(optimizer: OptimizerSection, path: str) -> None:
    """Checks that a path below `config.optimizer` can be a numeric argument of an optimizer."""
    section, keys = _owner(optimizer, path)
    # The trainer's own keys, such as `clip_norm`, are constants of the compiled step.
    own = {field.name for field in dataclasses.fields(section)} - {'node'}
    if keys[0] in own:
        raise UserError(
            f'{_VARY}: config.optimizer.{path} is not an argument of an optimizer; only those can '
            'vary'
        )
    inner: Any = section.node
    for key in keys[:-1]:
        inner = _child(inner, key)
        if not isinstance(inner, (Mapping, tuple, list)):
            raise UserError(f'{_VARY}: there is no config.optimizer.{path}: {key!r} is {inner!r}')
    # The last key may be missing from the config: an argument that has its default there.
    current = _child(inner, keys[-1])
    if isinstance(current, Mapping) and 'target' in current:
        raise UserError(
            f'{_VARY}: config.optimizer.{path} is not a number but {current["target"]}, which '
            f'numbers would replace. Vary one of its arguments, config.optimizer.{path}.NAME, or '
            'the factor of a trainer.schedules:scale around it'
        )


def _owner(section: OptimizerSection, path: str) -> tuple[OptimizerSection | GroupSection, Any]:
    """Returns the section whose optimizer a path leads into, and the keys below it.

    Raises:
        UserError: if there are groups, and the path is in none of them.
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
    near = suggest.nearest_name(name, section.groups)
    raise UserError(
        f'{_VARY}: config.optimizer.{path} is not an argument of the optimizer of a group. '
        + (
            f'Did you mean optimizer.{paths.join(["groups", near, *keys[2:]])}?'
            if near and near != name
            else f'The groups are {", ".join(section.groups)}'
        )
    )


def _child(node: Any, key: str | int) -> Any:
    try:
        return node[key]
    except (LookupError, TypeError):
        return None
