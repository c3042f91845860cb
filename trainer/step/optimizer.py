# SPDX-License-Identifier: Apache-2.0
"""From the config's optimizer to one optax transformation over all parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from trainer.config.errors import UserError
from trainer.modules.linen import param_path

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class RegexMask:
    """Maps a parameter tree to booleans: whether a leaf's whole path matches any pattern."""

    patterns: tuple[str, ...]

    def __call__(self, params: Any) -> Any:
        """Returns the tree of booleans."""
        expressions = [re.compile(pattern) for pattern in self.patterns]

        def matches(path: tuple[Any, ...], _: Any) -> bool:
            return any(e.fullmatch(param_path(path)) for e in expressions)

        return jax.tree_util.tree_map_with_path(matches, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optax transformation and what the trainer adds around it.

    Attributes:
        base: the transformation that the config's target made.
        learning_rate: its schedule, as a function of the number of updates; None if unknown.
        clip_norm: global norm over the trained parameters that gradients are scaled down to.
        freeze: patterns of whole parameter paths that keep their values and hold no state.
        lr_multipliers: (pattern, factor) pairs; the first match counts, all must be covered.
    """

    base: optax.GradientTransformation
    learning_rate: Schedule | None = None
    clip_norm: float | None = None
    freeze: tuple[str, ...] = ()
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def transformation(self, params: Any) -> optax.GradientTransformation:
        """Returns the complete transformation for these parameters (abstract ones will do).

        Raises:
            UserError: if a pattern matches no parameter, or a multiplier is missing for one.
        """
        parts = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        parts.append(self.base)
        if self.lr_multipliers:
            parts.append(_scale_each(_multipliers(params, self.lr_multipliers)))
        tx = parts[0] if len(parts) == 1 else optax.chain(*parts)
        if not self.freeze:
            return tx
        _check_used(params, self.freeze, 'config.optimizer.freeze')
        labels = jax.tree.map(
            lambda frozen: 'frozen' if frozen else 'trained', RegexMask(self.freeze)(params)
        )
        return optax.multi_transform({'trained': tx, 'frozen': optax.set_to_zero()}, labels)

    def trained(self, tree: Any) -> list[jax.Array]:
        """Returns the leaves of a parameter-shaped tree that are not frozen."""
        frozen = jax.tree.leaves(RegexMask(self.freeze)(tree))
        return [
            x for x, is_frozen in zip(jax.tree.leaves(tree), frozen, strict=True) if not is_frozen
        ]


def _scale_each(factors: Any) -> optax.GradientTransformation:
    """Scales each update by its own static factor: the same as scaling its learning rate."""

    def update(updates: Any, _: Any = None) -> Any:
        # Frozen parameters are masked out of the tree that arrives here, hence the look-up by path.
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * factors[param_path(path)], updates
        )

    return optax.stateless(update)


def _multipliers(params: Any, pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    _check_used(params, [pattern for pattern, _ in pairs], 'config.optimizer.lr_multipliers')
    expressions = [(re.compile(pattern), float(factor)) for pattern, factor in pairs]
    factors: dict[str, float] = {}
    for path in _paths(params):
        for expression, factor in expressions:
            if expression.fullmatch(path):
                factors[path] = factor
                break
    missing = [path for path in _paths(params) if path not in factors]
    if missing:
        raise UserError(
            'config.optimizer.lr_multipliers covers every parameter but '
            f'{_some(missing)}.\nAdd a last pair such as (".*", 1.0).'
        )
    return factors


def _check_used(params: Any, patterns: Sequence[str], where: str) -> None:
    paths = _paths(params)
    for pattern in patterns:
        expression = re.compile(pattern)
        if not any(expression.fullmatch(path) for path in paths):
            raise UserError(
                f'{where}: the pattern {pattern!r} matches no parameter. A pattern must match a '
                f'whole path, such as {_some(paths)}.'
            )


def _paths(params: Any) -> list[str]:
    return [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _some(paths: Sequence[str]) -> str:
    return ', '.join(paths[:5]) + (f' and {len(paths) - 5} more' if len(paths) > 5 else '')
