# SPDX-License-Identifier: Apache-2.0
"""Builds the optimizer of `config.optimizer` and the step function of `config.step`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from trainer.builders import by_examples, counts, decay, hyperparams, nodes
from trainer.builders import learning_rate as rates
from trainer.config import durations, objects, paths, signatures, targets
from trainer.config.durations import Clock
from trainer.config.errors import UserError
from trainer.config.sections import GroupSection, Node, OptimizerSection
from trainer.step.context import StepFunction
from trainer.step.optimizer import Group, Optimizer, RegexMask
from trainer.step.train_step import default_step

_log = logging.getLogger('trainer')

_OPTIMIZER, _STEP = 'config.optimizer', 'config.step'

# Schedules whose `decay_steps` (of the schedule, or of each cycle) include the warmup.
_WARMED_UP = (':warmup_cosine_decay_schedule', ':sgdr_schedule')

# The arguments of a step. A target that takes them is the step itself; any other returns it.
_STEP_ARGUMENTS = ('state', 'batch', 'ctx')


def check_optimizer(section: OptimizerSection | GroupSection, path: str = _OPTIMIZER) -> None:
    """Checks every name and argument of an optimizer, without calling anything.

    Args:
        section: `config.optimizer`, or one of its groups.
        path: its config path, for messages.

    Raises:
        UserError: for a name that does not exist, or an invalid argument.
    """
    groups = section.groups if isinstance(section, OptimizerSection) else {}
    for name, group in groups.items():
        check_optimizer(group, f'{path}.groups.{name}')
    if section.eval_params is not None:
        targets.check(section.eval_params, f'{path}.eval_params')
    if not groups:
        if 'target' not in section.node:
            raise UserError(f"{path}.target is missing; name an optimizer, such as 'optax:sgd'")
        targets.check(section.node, path)
        return
    own = ('decay_mask', 'eval_params')
    given = [*section.node, *(name for name in own if getattr(section, name) is not None)]
    if given:
        raise UserError(
            f'{path}.{given[0]}: with {path}.groups each group has its own optimizer, and this '
            f'key belongs there, as in {path}.groups.{next(iter(groups))}.{given[0]}'
        )


def build_optimizer(
    section: OptimizerSection,
    clock: Clock,
    numbers: Mapping[str, Any] | None = None,
    logged: Sequence[str] = (),
) -> tuple[Optimizer, dict[str, int]]:
    """Returns the optimizer, and the steps of each duration inside it by config path.

    Args:
        section: `config.optimizer`.
        clock: converts durations to steps.
        numbers: replacements for some of its arguments, by path below the section, possibly
            traced; they become part of the optimizer's state.
        logged: `config.log.learning_rates`.

    Raises:
        UserError: for an invalid argument.
    """
    numbers = numbers or {}
    _check_logged(section, logged)
    if not section.groups:
        single, steps = _build_one(section, clock, _OPTIMIZER, numbers, logged)
        return _with_freezing(single, section), steps
    groups: dict[str, Group] = {}
    steps = {}
    for name, group in section.groups.items():
        path = f'{_OPTIMIZER}.groups.{name}'
        single, more = _build_one(group, clock, path, numbers, logged)
        groups[name] = Group(params=_patterns(group.params), optimizer=single, loss=group.loss)
        steps.update(more)
    whole = Optimizer(
        groups=MappingProxyType(groups),
        clip_norm=section.clip_norm,
        lr_multipliers=section.lr_multipliers or (),
    )
    return _with_freezing(whole, section), steps


def _with_freezing(optimizer: Optimizer, section: OptimizerSection) -> Optimizer:
    return dataclasses.replace(
        optimizer,
        freeze=_patterns(section.freeze),
        freeze_statistics=_patterns(section.freeze_statistics),
    )


def _build_one(
    section: OptimizerSection | GroupSection,
    clock: Clock,
    path: str,
    numbers: Mapping[str, Any],
    logged: Sequence[str],
) -> tuple[Optimizer, dict[str, int]]:
    given = counts.with_integer_keys(section.node, path)
    # Before durations become steps: afterwards it is unknown which schedules count examples.
    by_example = by_examples.find_schedules(given, path, clock) if clock.progress else []
    shift = functools.partial(by_examples.shift_schedules, schedules=by_example, clock=clock)
    node, steps = durations.resolve(given, clock, path)
    _check_warmups(node, path)
    counts.check(node, steps, path)
    decaying = _patterns(section.decay_mask)
    if section.decay_mask is not None:
        node = decay.mask_decay(node, path, RegexMask(decaying))
    # Paths of `numbers` and `logged` are below `config.optimizer`: 'groups.a.learning_rate'.
    prefix = f'{path}.'.removeprefix(f'{_OPTIMIZER}.')
    mine = {n.removeprefix(prefix): x for n, x in numbers.items() if n.startswith(prefix)}
    base = hyperparams.inject(node, path, mine, prefix=prefix, changed=shift) if mine else None
    named = [name.removeprefix(prefix) for name in logged if name.startswith(prefix)]
    # Built schedules replace their nodes, so that the optimizer and the log use the same objects.
    # Shifted last, because `numbers` may replace arguments of a schedule.
    node, learning_rate = rates.build_rates(
        shift(hyperparams.insert_values(node, mine)), path, named
    )
    if base is None:
        base = targets.instantiate(node, path)
        _check_is_optimizer(base, node, path)
        if learning_rate is None and not str(node['target']).endswith(':set_to_zero'):
            _log.warning(
                'The learning rate of %s is unknown and will not be logged%s',
                path,
                _learning_rate_hint(node, prefix),
            )
    return Optimizer(
        base=base,
        learning_rate=learning_rate,
        clip_norm=section.clip_norm,
        lr_multipliers=section.lr_multipliers or (),
        decay_mask=decaying,
        eval_params=_eval_params(section.eval_params, path, injected=bool(mine)),
        path=path,
    ), steps


def _learning_rate_hint(node: Node, prefix: str) -> str:
    """Returns the key to set for logging the first learning rate of a nested optimizer, or ''."""
    for keys, value in nodes.walk(node):
        if len(keys) > 1 and keys[-1] == 'learning_rate' and value is not None:
            return f": name it in config.log.learning_rates=('{prefix}{paths.join(keys)}',)"
    return ''


def _check_logged(section: OptimizerSection, logged: Sequence[str]) -> None:
    """Checks that each key of `config.log.learning_rates` is in a group, if there are groups.

    Raises:
        UserError: for a key that is in none.
    """
    for name in logged if section.groups else ():
        if not any(name.startswith(f'groups.{group}.') for group in section.groups):
            first = next(iter(section.groups))
            raise UserError(
                f'config.log.learning_rates: {name!r} is in no group of {_OPTIMIZER}.groups; '
                f"expected a key such as 'groups.{first}.args[1].learning_rate'"
            )


def _eval_params(node: Node | None, path: str, *, injected: bool) -> Any:
    """Returns the `eval_params` function of an optimizer, or None.

    Args:
        node: the function's node, or None.
        path: config path of the optimizer.
        injected: whether the optimizer state is wrapped in one with hyperparameters.
    """
    if node is None:
        return None
    function = targets.instantiate(node, f'{path}.eval_params')
    # Any two values: only the number of arguments is checked.
    try:
        inspect.signature(function).bind('state', 'params')
    except TypeError as error:
        raise UserError(
            f'{path}.eval_params: expected a function (state, parameters) -> parameters, got '
            f'{function!r} ({error})'
        ) from error
    return functools.partial(_call_with_inner_state, function) if injected else function


def _call_with_inner_state(function: Any, state: Any, params: Any) -> Any:
    return function(state.inner_state, params)


def _check_is_optimizer(value: Any, node: Node, path: str) -> None:
    """Checks that a target has returned an optimizer."""
    # By its methods: any pair of `init` and `update` is one, not only optax's NamedTuple.
    if all(callable(getattr(value, name, None)) for name in ('init', 'update')):
        return
    advice = "Name one that does, such as 'optax:sgd'"
    if str(node['target']).endswith(('inject_hyperparams', 'inject_stateful_hyperparams')):
        advice = (
            'It is not needed here: name the optimizer itself. The learning rate is logged, and '
            'numbers that config.ensemble.vary names are in the state'
        )
    elif callable(value):
        advice += f'; a schedule belongs in {path}.learning_rate'
    raise UserError(
        f'{path}.target: {node["target"]} does not return an optimizer (with methods `init` and '
        f'`update`), but {value!r:.200}. {advice}'
    )


def _check_warmups(node: Any, path: str, within: str = '') -> None:
    """Checks that a warmup is shorter than the schedule that includes it."""
    if isinstance(node, (tuple, list)):
        for index, value in enumerate(node):
            _check_warmups(value, f'{path}[{index}]', within)
    if not isinstance(node, Mapping):
        return
    # The cycles of `sgdr_schedule` are plain dicts, without a target of their own.
    within = str(node.get('target', within))
    if within.endswith(_WARMED_UP):
        warmup, whole = node.get('warmup_steps'), node.get('decay_steps')
        if isinstance(warmup, int) and isinstance(whole, int) and warmup >= whole:
            raise UserError(
                f'{path}.warmup_steps: a warmup of {warmup:,} steps does not fit into the '
                f'{whole:,} steps of {path}.decay_steps, which include it; make it shorter, or '
                'the run longer (config.train_for)'
            )
    for key, value in node.items():
        _check_warmups(value, f'{path}.{key}', within)


def _patterns(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def check_step(node: Node | None) -> None:
    """Checks the name and the arguments of `config.step`, without calling anything.

    Raises:
        UserError: for a name that does not exist, or an invalid argument.
    """
    if node is not None:
        # The arguments that the trainer passes must not be reported as missing.
        own = dict.fromkeys(_STEP_ARGUMENTS) if _is_step(node) else {}
        targets.check({**node, **own}, _STEP)


def build_step(node: Node | None) -> StepFunction:
    """Returns the step function, the default one if `config.step` is not set.

    A target that takes `state`, `batch` and `ctx` is the step itself; its other arguments come
    from the config. Any other target is called and must return the step. A `ref` names the step.

    Raises:
        UserError: if the result is not a function of these three arguments.
    """
    if node is None:
        return default_step
    if _is_step(node):
        rest = {name: value for name, value in node.items() if name not in targets.RESERVED}
        target = objects.resolve(node['target'], f'{_STEP}.target')
        return functools.partial(target, **targets.instantiate(rest, _STEP))
    function = targets.instantiate(node, _STEP)
    try:
        inspect.signature(function).bind(*_STEP_ARGUMENTS)
    except TypeError as error:
        raise UserError(
            f'{_STEP}: expected a function (state, batch, ctx) -> (state, metrics), or a target '
            f'that returns one; got {function!r} ({error})'
        ) from error
    return function


def _is_step(node: Node) -> bool:
    """Whether the target is the step itself, and not a function that returns it."""
    if 'target' not in node:
        return False
    known, _ = signatures.arguments(objects.resolve(node['target'], f'{_STEP}.target'))
    return all(name in known for name in _STEP_ARGUMENTS)
