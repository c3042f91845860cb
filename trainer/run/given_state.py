# SPDX-License-Identifier: Apache-2.0
"""Training that continues from a state of the caller, such as one of another experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.modules.shapes import describe
from trainer.parallel.host import fetch
from trainer.run.restore import init_state, with_health, with_hyperparams
from trainer.step import donated
from trainer.step.programs import Programs
from trainer.step.state import TrainState


def adopt(
    experiment: Experiment, programs: Programs, given: TrainState, message: Callable[[str], None]
) -> tuple[TrainState, int]:
    """Returns a state as the programs of this experiment take it, and its step.

    Parameters and collections must have the same names and shapes; what else does not fit is reset,
    with a message.

    Args:
        experiment: what is trained from here on.
        programs: programs of the experiment.
        given: a state of this experiment or of a similar one.
        message: prints a line.

    Raises:
        UserError: if the parameters differ from the model's, or the state is past the end.
    """
    if not isinstance(given, TrainState):
        raise UserError(
            f'fit(state): expected a TrainState, such as result.state, got a {type(given).__name__}'
        )
    donated.check(given, 'fit(state)')
    wanted = programs.abstract
    for part in ('params', 'collections'):
        _check_same(part, getattr(given, part), getattr(wanted, part))
    step, total = int(fetch(given.step)), experiment.training.total_steps
    if step > total:
        raise UserError(
            f'fit(state): the state is at step {step:,}, but config.train_for is only {total:,} '
            'steps. Use a longer train_for.'
        )
    parts: dict[str, Any] = {name: getattr(given, name) for name in _KEPT}
    unfit = [name for name in _KEPT if not _are_same(parts[name], getattr(wanted, name))]
    if unfit:
        parts.update(_reset(experiment, programs, given, unfit))
        what = ', '.join(_KEPT[name] for name in unfit)
        message(f'fit(state): this experiment has another {what}, which is reset.')
    parts['metrics'] = programs.empty_metrics()
    placed = dataclasses.replace(given, **parts, health=None)
    durable = wanted.durable
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), placed, durable)
    return with_health(experiment, programs, with_hyperparams(experiment, state)), step


# The parts that may differ between experiments with the same model, and their names in messages.
_KEPT = {
    'opt_state': 'optimizer state',
    'ema': 'moving average',
    'loss_scale': 'loss scale',
}


def _reset(
    experiment: Experiment, programs: Programs, given: TrainState, names: list[str]
) -> dict[str, Any]:
    """Returns fresh parts of a state, the optimizer's and the average's for its parameters."""
    fresh = init_state(experiment, programs)
    # Copies, since the program below donates them.
    params = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(fetch(x)), like.sharding),
        given.params,
        programs.abstract.params,
    )
    if {'opt_state', 'ema'} & set(names):
        fresh = programs.restart_optimizer(dataclasses.replace(fresh, params=params))
    return {name: getattr(fresh, name) for name in names}


def _are_same(tree: Any, wanted: Any) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""
    found: Any = jax.tree.structure(tree)
    if found != jax.tree.structure(wanted):
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    return all((x.shape, x.dtype) == (like.shape, like.dtype) for x, like in pairs)


def _check_same(part: str, tree: Any, wanted: Any) -> None:
    """Raises a UserError that names the first array that differs."""
    found, expected = (
        {jax.tree_util.keystr(path): describe(x) for path, x in jax.tree.leaves_with_path(each)}
        for each in (tree, wanted)
    )
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            have, need = found.get(name, 'absent'), expected.get(name, 'absent')
            raise UserError(
                f'fit(state): {part}{name} is {have} in the state, and {need} in the model of this '
                'experiment; for weights of another model use config.init_from'
            )
