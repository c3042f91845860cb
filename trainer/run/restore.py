# SPDX-License-Identifier: Apache-2.0
"""The state that a run starts from: initialized, or restored from a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import numpy as np

from trainer.checkpoint.errors import CheckpointError, DamageError
from trainer.checkpoint.manager import Checkpoints
from trainer.config.errors import UserError
from trainer.ensemble import hyperparams
from trainer.experiment import Experiment
from trainer.input.fingerprint import check_vocabulary
from trainer.parallel.host import fetch
from trainer.run.workdir import Workdir
from trainer.step import health
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.weights.first_state import load_initial_weights

_log = logging.getLogger('trainer')


def init_state(experiment: Experiment, programs: Programs) -> TrainState:
    """Returns the initial state of a run, every leaf created on the devices that hold it.

    Raises:
        UserError: if the weights of `config.init_from` do not fit the model, or are those of a
            model of other tokens.
    """
    if experiment.start.weights is not None:
        experiment.start.weights.check_vocabulary(experiment.data)
    return load_initial_weights(
        programs.init(),
        experiment.start.weights,
        experiment.start.surgery,
        restart_optimizer=lambda state: programs.restart_optimizer(state),
        members=experiment.ensemble is not None,
    )


def restore_chosen(
    experiment: Experiment,
    workdir: Workdir | None,
    checkpoints: Checkpoints | None,
    programs: Programs,
    step: int | str,
) -> TrainState:
    """Returns the state of the checkpoint that a user chooses.

    Args:
        experiment: what was trained.
        workdir: the work directory, or None.
        checkpoints: those of the work directory, or None without one.
        programs: the training programs.
        step: a step, 'latest' or 'best'.

    Raises:
        UserError: if there is no such checkpoint.
        CheckpointError: if its arrays differ from those that were saved.
    """
    if checkpoints is None:
        raise UserError('restore: this Trainer has no work directory')
    if step == 'best' and experiment.saving.retention.best_metric is None:
        raise UserError(
            '--step=best needs a metric, and this config defines none. Add '
            '--config.checkpoint.best.metric=eval/NAME/accuracy'
        )
    if workdir is not None and not workdir.path.exists():
        raise UserError(f'no run in {workdir.path}: the directory does not exist')
    steps = checkpoints.steps()
    aliases = {'latest': checkpoints.latest, 'best': checkpoints.best}
    # The command line passes text. `isdigit` alone accepts digits such as '²', which `int` rejects.
    number = int(step) if str(step).isascii() and str(step).isdigit() else None
    chosen = aliases[str(step)]() if step in aliases else number
    if chosen is None or chosen not in steps:
        available = ', '.join(map(str, steps)) or 'none'
        raise UserError(
            f'no checkpoint {step!r} in {checkpoints.directory}; available: {available}'
        )
    try:
        return restore(experiment, checkpoints, programs, chosen)
    except DamageError as error:
        others = ', '.join(str(each) for each in steps if each != chosen)
        raise CheckpointError(f'{error}. Other checkpoints: {others or "none"}.') from error


def restore(
    experiment: Experiment, checkpoints: Checkpoints, programs: Programs, step: int
) -> TrainState:
    """Returns the state of a checkpoint.

    Args:
        experiment: what was trained.
        checkpoints: those of the work directory.
        programs: the training programs.
        step: number of a step that was saved.

    Raises:
        CheckpointError: if its arrays differ from those that were saved.
        UserError: if the tokens of the data have another vocabulary than the run had.
    """
    # Before the arrays, which can take minutes to read.
    saved_data = checkpoints.meta(step).get('data')
    check_vocabulary(experiment.data, saved_data, f'the checkpoint of step {step:,}')
    state = checkpoints.restore(step, programs.abstract, free='metrics')
    saved: Any = jax.tree.structure(state.metrics)
    if saved != jax.tree.structure(programs.abstract.metrics):
        _log.warning(
            'the training metrics of this config are not those of the checkpoint of step %d: a '
            'resumed run resets them, so its next row covers only the later steps',
            step,
        )
        state = dataclasses.replace(state, metrics=programs.empty_metrics())
    if experiment.ensemble is None:
        return state
    # Evaluations leave out members that have diverged, so they need the health too.
    saved_health = checkpoints.meta(step).get('health')
    if saved_health is None:
        return state
    return _with_health(state, _clean_health(programs), saved_health)


def with_health(
    experiment: Experiment, programs: Programs, state: TrainState, saved_health: Any = None
) -> TrainState:
    """Returns a fresh or restored state with the health to resume from.

    Args:
        experiment: what is trained.
        programs: the training programs.
        state: fresh, or from a checkpoint.
        saved_health: what `health.to_metadata` returned when the state was saved.

    Raises:
        DamageError: if `saved_health` has another shape.
    """
    clean = _clean_health(programs)
    if clean is None:
        return state
    state = dataclasses.replace(state, health=clean)
    if experiment.ensemble is not None or fetch(programs.sweep(state).kind):
        # Counts non-finite values in every leaf; usually the sweep shows that there are none.
        clean = programs.examine(state.durable)
    return _with_health(state, clean, saved_health)


def with_hyperparams(experiment: Experiment, state: TrainState) -> TrainState:
    """Returns a restored state with the current values of `config.ensemble.vary`."""
    ensemble = experiment.ensemble
    if ensemble is None:
        return state
    opt_state = hyperparams.write(state.opt_state, ensemble.values)
    return dataclasses.replace(state, opt_state=opt_state)


def _clean_health(programs: Programs) -> health.Health | None:
    """Returns the health of a finite state; None if the train step does not track health."""
    abstract = programs.abstract.health
    if abstract is None:
        return None
    # With the sharding of the traced state: compiled programs accept no other.
    zeros = np.zeros(abstract.packed.shape, np.int32)
    return health.Health(jax.device_put(zeros, abstract.packed.sharding))


def _with_health(state: TrainState, clean: health.Health | None, saved_health: Any) -> TrainState:
    """Returns a state with its health from `saved_health`, the result of `health.to_metadata`."""
    if clean is None:
        return state
    try:
        return dataclasses.replace(state, health=health.from_metadata(clean, saved_health))
    except ValueError as error:
        raise DamageError(
            f"the checkpoint of step {int(fetch(state.step)):,} is damaged: 'health' in its "
            f'metadata: {error}'
        ) from error
