# SPDX-License-Identifier: Apache-2.0
"""The config's optimizer as one optax transformation over all parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config.errors import UserError, and_more
from trainer.modules import patterns
from trainer.modules.model_view import param_path
from trainer.step import views
from trainer.step.objective import bind_loss
from trainer.tasks.task import ONLY_LOSS

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class RegexMask:
    """Maps a parameter tree to booleans: whether any pattern matches a leaf's whole path."""

    patterns: tuple[str, ...]

    def __call__(self, params: Any) -> Any:
        """Returns the tree of booleans."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: patterns.matches(self.patterns, param_path(path)),
            params,
            is_leaf=views.is_pair,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A group of parameters, with its optimizer and the loss that drives it.

    Attributes:
        params: patterns of whole parameter paths.
        optimizer: turns their gradients into updates; it has no groups of its own.
        loss: name of the loss whose gradient they follow; None if the task has one unnamed loss.
    """

    params: tuple[str, ...]
    optimizer: Optimizer
    loss: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optax transformation, and what the trainer adds to it.

    Attributes:
        base: the transformation that the config's target returned; None with groups.
        groups: the groups of parameters by name, used instead of `base`.
        learning_rate: the schedule of `base`, a function of the number of updates; several by name;
            None if unknown.
        clip_norm: maximal global norm of the gradients of all trained parameters.
        freeze: patterns of whole parameter paths that keep their values and have no slots.
        freeze_statistics: patterns of whole paths of other variables that keep their values, such
            as the running mean of a normalization layer. In training, the layer still normalizes
            with the statistics of the batch.
        lr_multipliers: (pattern, factor) pairs; the first match counts. Every parameter must match.
        decay_mask: patterns of the parameters that `base` decays; they are only checked here.
        eval_params: computes the parameters to evaluate from the state of `base` and the
            parameters; None evaluates the parameters themselves.
        path: its key path in the config, for messages.
    """

    base: optax.GradientTransformation | None = None
    groups: Mapping[str, Group] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )
    learning_rate: Schedule | Mapping[str, Schedule] | None = dataclasses.field(
        default=None, hash=False
    )
    clip_norm: float | None = None
    freeze: tuple[str, ...] = ()
    freeze_statistics: tuple[str, ...] = ()
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    decay_mask: tuple[str, ...] = ()
    eval_params: Callable[[Any, Any], Any] | None = dataclasses.field(default=None, hash=False)
    path: str = 'config.optimizer'

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f'{self.path}.clip_norm: expected more than 0, got {self.clip_norm}')

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the losses that drive some parameters, sorted."""
        return tuple(sorted({group.loss or ONLY_LOSS for group in self.groups.values()})) or (
            ONLY_LOSS,
        )

    @property
    def learning_rates(self) -> Schedule | Mapping[str, Schedule] | None:
        """The schedule, or those of the groups by name; None if none is known."""
        known: dict[str, Schedule] = {}
        for name, group in self.groups.items():
            rate = group.optimizer.learning_rate
            if isinstance(rate, Mapping):
                known.update({f'{name}/{part}': each for part, each in rate.items()})
            elif rate is not None:
                known[name] = rate
        return known or self.learning_rate

    def check_learning_rates(self) -> None:
        """Checks that each learning rate is a scalar function of the number of updates.

        Raises:
            UserError: if one is not.
        """
        rates = self.learning_rates
        by_name = rates if isinstance(rates, Mapping) else {'': rates}
        for name, rate in by_name.items():
            if rate is None:
                continue
            where = f'{self.path}: the learning rate' + (f' of {name}' if name else '')
            try:
                shape = jax.eval_shape(rate, jax.ShapeDtypeStruct((), jnp.int32)).shape
            except (TypeError, AttributeError) as error:
                raise UserError(
                    f'{where} must be a function from the number of updates to a number; '
                    f'{rate!r} failed: {error}'
                ) from error
            if shape != ():
                raise UserError(f'{where} must be a scalar; {rate!r} returned shape {shape}')

    def transformation(self, params: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the complete transformation for these parameters, arrays or shapes.

        Its state and updates for half-precision parameters are float32. For complex parameters its
        updates are complex, and it expects the conjugate of what `jax.grad` returns.

        Raises:
            UserError: if a pattern matches no parameter; if a parameter has no multiplier, does not
                belong to exactly one group, or is neither floating-point nor complex.
        """
        views.check_numbers(params)
        # The float32 view is the outermost: clipping and multipliers must not round, either.
        tx = views.with_float32_view(self._without_float32_view(params), params)
        return optax.with_extra_args_support(tx)

    def _without_float32_view(self, params: Any) -> optax.GradientTransformation:
        """Returns the transformation without the float32 view.

        `state_of_base` depends on this structure.
        """
        _check_decays(_paths(params), self.decay_mask, f'{self.path}.decay_mask')
        # Clipping comes first: it is for gradients. Multipliers come last: an adaptive optimizer
        # normalizes its gradients, so it would cancel factors on them.
        parts = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        if self.base is None:
            parts.append(self._combine_groups(params))
        else:
            parts.append(views.with_real_view(self.base, params))
        if self.lr_multipliers:
            where = f'{self.path}.lr_multipliers'
            parts.append(_scale_each(_multipliers(params, self.lr_multipliers, where)))
        tx = parts[0] if len(parts) == 1 else optax.chain(*parts)
        if not self.freeze:
            return tx
        # Around the whole chain, so that frozen parameters have no slots and do not count in the
        # norm that gradients are clipped by.
        patterns.check_used(self.freeze, _paths(params), f'{self.path}.freeze')
        labels = jax.tree.map(
            lambda frozen: 'frozen' if frozen else 'trained', RegexMask(self.freeze)(params)
        )
        return optax.multi_transform(
            {'trained': tx, 'frozen': optax.set_to_zero()},
            labels,
            mask_compatible_extra_args=True,
        )

    def state_of_base(self, opt_state: Any) -> Any:
        """Returns the state of `base`, or of the groups, within that of the transformation."""
        if self.freeze:
            opt_state = opt_state.inner_states['trained'].inner_state
        if self.clip_norm is None and not self.lr_multipliers:
            return opt_state
        # A chain: clipping, if any, comes before the optimizer.
        return opt_state[0 if self.clip_norm is None else 1]

    def frozen_mask(self, params: Any) -> Any:
        """Returns for each parameter whether it is frozen."""
        return RegexMask(self.freeze)(params)

    def check_statistics(self, collections: Mapping[str, Any]) -> None:
        """Checks that each pattern of `freeze_statistics` matches a variable.

        Args:
            collections: the variables other than parameters, by collection.

        Raises:
            UserError: if one does not.
        """
        paths = [path for tree in collections.values() for path in _paths(tree)]
        where = f'{self.path}.freeze_statistics'
        patterns.check_used(
            self.freeze_statistics, paths, where, 'no variable other than parameters'
        )

    def keep_frozen_statistics(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """Returns the new collections, with old values where `freeze_statistics` matches."""
        if not self.freeze_statistics:
            return new
        frozen = RegexMask(self.freeze_statistics)
        return {
            name: jax.tree.map(lambda keep, x, y: x if keep else y, frozen(tree), tree, new[name])
            for name, tree in old.items()
        }

    def owners(self, params: Any) -> dict[str, str]:
        """Returns the name of the group that each trained parameter belongs to, by path.

        Raises:
            UserError: if a parameter belongs to no group or to several, or a pattern matches none.
        """
        for name, group in self.groups.items():
            patterns.check_used(group.params, _paths(params), f'{self.path}.groups.{name}.params')
        names_by_path = {
            path: [
                name for name, group in self.groups.items() if patterns.matches(group.params, path)
            ]
            for path in _paths(params)
            if not patterns.matches(self.freeze, path)
        }
        missing = [path for path, names in names_by_path.items() if not names]
        shared = [
            f'{path} ({", ".join(names)})'
            for path, names in names_by_path.items()
            if len(names) > 1
        ]
        if missing or shared:
            raise UserError(
                f'{self.path}.groups: every parameter must belong to exactly one group.'
                + (f'\nIn none: {and_more(missing, 5)}.' if missing else '')
                + (f'\nIn several: {and_more(shared, 5)}.' if shared else '')
                + '\nChange the patterns in `params` of the groups'
                + (
                    f', or list parameters that should not change in {self.path}.freeze.'
                    if missing
                    else '.'
                )
            )
        return {path: names[0] for path, names in names_by_path.items()}

    def select(self, by_loss: Mapping[str, Any]) -> Any:
        """Returns one parameter-shaped tree, with each leaf from the tree of its loss.

        Args:
            by_loss: a parameter-shaped tree for each of `losses`. With several losses, frozen
                leaves become zeros.
        """
        # One loss drives all parameters: nothing to select, and no zeros for frozen ones.
        if len(by_loss) == 1:
            return next(iter(by_loss.values()))
        trees = list(by_loss.values())
        owners, index = self.owners(trees[0]), {name: i for i, name in enumerate(by_loss)}

        def select_leaf(path: tuple[Any, ...], *leaves: Any) -> Any:
            owner = owners.get(param_path(path))
            if owner is None:
                return jnp.zeros_like(leaves[0])
            return leaves[index[self.groups[owner].loss or ONLY_LOSS]]

        return jax.tree_util.tree_map_with_path(select_leaf, *trees)

    def check_losses(self, loss: Any) -> None:
        """Checks that the groups name losses of the task's output, and all of them.

        Args:
            loss: the loss of the output: an array, or a dict by name.

        Raises:
            UserError: if a group names another loss, or no group names one of them.
        """
        names = tuple(loss) if isinstance(loss, Mapping) else ()
        if names and not self.groups:
            raise UserError(
                f'the task returns the losses {", ".join(names)}, but {self.path}.groups does not '
                "assign parameters to them: groups={'NAME': dict(target=..., params='REGEX', "
                f'loss={names[0]!r}), ...}}. A dict means several losses; for one loss and its '
                'metrics return (loss, dict of metrics)'
            )
        for name, group in self.groups.items():
            if group.loss not in (names or (None,)):
                where = f'{self.path}.groups.{name}.loss'
                if group.loss is None:
                    raise UserError(f'{where} is missing; the task returns {", ".join(names)}')
                raise UserError(
                    f'{where}: the task has no loss {group.loss!r}; it returns '
                    + (', '.join(names) if names else 'one without a name')
                )
        unused = [name for name in names if name not in self.losses]
        if unused:
            raise UserError(
                f'the task returns the loss {unused[0]!r}, but no entry of {self.path}.groups '
                'names it. Return it among the metrics, or name it in a group'
            )

    def _combine_groups(self, params: Any) -> optax.GradientTransformation:
        owners = self.owners(params)

        def labels(tree: Any) -> Any:
            # Recomputed for each tree, because frozen leaves are masked out of it.
            return jax.tree_util.tree_map_with_path(lambda path, _: owners[param_path(path)], tree)

        def members(name: str) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: x if owners.get(param_path(path)) == name else optax.MaskedNode(),
                params,
            )

        # The optimizers of the groups are built for their own parameters only, so that patterns are
        # checked against these. The float32 view is around all of them: see `transformation`.
        return optax.multi_transform(
            {
                name: bind_loss(group.optimizer._without_float32_view(members(name)), group.loss)
                for name, group in self.groups.items()
            },
            labels,
            mask_compatible_extra_args=True,
        )


def _scale_each(factors: Any) -> optax.GradientTransformation:
    """Scales each update by a constant factor, which is the same as scaling its learning rate."""

    def update(updates: Any, _: Any = None) -> Any:
        # By path, because frozen leaves are masked out of this tree.
        return jax.tree_util.tree_map_with_path(
            lambda path, u: u * factors[param_path(path)], updates
        )

    return optax.stateless(update)


def _multipliers(params: Any, pairs: Sequence[tuple[str, float]], where: str) -> dict[str, float]:
    patterns.check_used([pattern for pattern, _ in pairs], _paths(params), where)
    expressions = [(re.compile(pattern), float(factor)) for pattern, factor in pairs]
    factors: dict[str, float] = {}
    for path in _paths(params):
        # The first match counts, so that a general pattern can follow special ones.
        for expression, factor in expressions:
            if expression.fullmatch(path):
                factors[path] = factor
                break
    missing = [path for path in _paths(params) if path not in factors]
    if missing:
        raise UserError(
            f'{where}: no pattern matches {and_more(missing, 5)}.\n'
            'Add a last pair such as (".*", 1.0).'
        )
    return factors


def _check_decays(paths: Sequence[str], decayed: Sequence[str], where: str) -> None:
    """Checks that some parameter decays; a single pattern may match nothing in this model."""
    # A group all of whose parameters are frozen has no `paths`.
    if paths:
        patterns.check_used(decayed, paths, where, 'no parameter, so nothing decays', each=False)


def _paths(params: Any) -> list[str]:
    return [param_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
