# SPDX-License-Identifier: Apache-2.0
"""Checks and warnings at the start of a run: what does not fit, and what will never happen."""

from __future__ import annotations

import logging
import math

import jax
from jax.sharding import Mesh

from trainer.config.durations import Periodic
from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.input.fields import MASK
from trainer.modules.model_view import param_path
from trainer.parallel.mesh import BATCH_AXES
from trainer.parallel.sharding import logical_rules
from trainer.run.events import Events
from trainer.step import combinations
from trainer.step.programs import Programs
from trainer.step.state import TrainState
from trainer.step.train_step import default_step

_log = logging.getLogger('trainer')


def check_batch(experiment: Experiment, shards: int) -> None:
    """Checks that a batch divides over devices and accumulation slices.

    Raises:
        UserError: naming batch sizes that would.
    """
    rows, parts = experiment.clock.batch_size, shards * experiment.training.accumulate
    if rows % parts == 0:
        return
    below, above = rows // parts * parts, -(-rows // parts) * parts
    near = f'{above}' if below == 0 else f'{below} or {above}'
    raise UserError(
        f'config.data.batch_size: {rows} rows do not divide over {shards} devices x '
        f'{experiment.training.accumulate} accumulation slices; {near} would'
    )


def check_programs(experiment: Experiment, programs: Programs, mesh: Mesh) -> None:
    """Checks what the traced state shows, and warns of what is suspicious in it.

    Raises:
        UserError: if the optimizer's state does not fit other keys of the config.
    """
    state = programs.abstract
    combinations.check(
        experiment.optimizer,
        state.opt_state,
        ema=experiment.training.ema_decay is not None,
        own_step=experiment.step is not default_step,
    )
    combinations.warn_of_eval_point(experiment.optimizer, state.opt_state)
    warn_of_slices(experiment, state)
    warn_of_rows_that_do_not_count(programs)
    warn_of_idle_axes(experiment, state, mesh)


def warn_at_start(experiment: Experiment, events: Events, state: TrainState, mesh: Mesh) -> None:
    """Warns of what this run asks for in vain, and of gradients that may be wrong."""
    warn_of_what_never_comes(experiment)
    warn_of_best(experiment, events)
    warn_of_wrong_gradients(state, mesh)


def warn_of_slices(experiment: Experiment, state: TrainState) -> None:
    """Says that batch statistics are those of slices, where a batch is cut into some."""
    if experiment.training.accumulate > 1 and 'batch_stats' in state.collections:
        _log.warning(
            'the model has batch statistics and config.accumulate=%d: each slice is normalised by '
            'its own, so the update is not quite that of the whole batch',
            experiment.training.accumulate,
        )


def warn_of_rows_that_do_not_count(programs: Programs) -> None:
    """Warns that batch statistics count rows of weight 0, if there may be any."""
    if 'batch_stats' not in programs.abstract.collections:
        return
    why = []
    if MASK in programs.fields.sent:
        why.append("config.data.remainder='pad'")
    if programs.task.is_weighted:
        why.append('a task that returns weights')
    if why:
        _log.warning(
            'the model has batch statistics, and rows may have weight 0 (%s): in the statistics, '
            'each such row counts as a copy of a row with nonzero weight',
            ' and '.join(why),
        )


def warn_of_idle_axes(experiment: Experiment, state: TrainState, mesh: Mesh) -> None:
    """Says which axes of the mesh cut neither the batch nor any array: their devices repeat work.

    Axes that rules by name mention are left out, for activations may be cut over them.
    """
    used = set(BATCH_AXES)
    for _, axes in logical_rules(experiment.devices.sharding):
        used.update((axes,) if isinstance(axes, str) else axes or ())
    for leaf in jax.tree.leaves(state):
        for axes in leaf.sharding.spec:
            used.update((axes,) if isinstance(axes, str) else axes or ())
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            _log.warning(
                'config.mesh.%s=%d cuts no parameter, and batches are cut over %s only: unless the '
                'model names this axis in its activations, its devices all do the same work',
                name,
                size,
                ' and '.join(BATCH_AXES),
            )


def warn_of_wrong_gradients(state: TrainState, mesh: Mesh) -> None:
    """Says where XLA for CPUs has been seen to compute wrong gradients, in JAX alone.

    It is so for kernels cut over two axes of one size, beside a batch that is cut over another
    axis, as long as nothing says how what the layers return is cut.
    """
    if mesh.devices.flat[0].platform != 'cpu' or mesh.shape.get('data', 1) == 1:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        every = [(axes,) if isinstance(axes, str) else axes or () for axes in leaf.sharding.spec]
        sizes = [math.prod(mesh.shape[axis] for axis in axes) for axes in every]
        sizes = [size for size in sizes if size > 1]
        if len(set(sizes)) < len(sizes):
            _log.warning(
                '%s is cut over two axes of the mesh of size %d, and batches over config.mesh.data:'
                ' XLA for CPUs has been seen to compute wrong gradients there, unless the model '
                'names its activations: nn.with_logical_constraint, '
                'jax.lax.with_sharding_constraint',
                param_path(path),
                max(size for size in sizes if sizes.count(size) > 1),
            )
            return


def warn_of_what_never_comes(experiment: Experiment) -> None:
    """Says which keys ask for something that this run is too short for."""
    total = experiment.training.total_steps
    late = []
    if experiment.logging.profile is not None and experiment.logging.profile.start >= total:
        late.append('config.profile')
    for name, capture in experiment.logging.captures.items():
        first = capture.every.next_due(0)
        if first is not None and first > total:
            late.append(f'config.capture.{name}')
    if late:
        _log.warning('%s: never comes in a run of %d steps', ', '.join(late), total)
    if (early := experiment.training.early_stopping) is not None:
        name = early.metric.split('/')[1]
        every = experiment.evals[name].every
        first = experiment.clock.period(every, path=f'config.evals.{name}.every').next_due(0)
        if first is None or first >= total:
            _log.warning(
                'config.early_stopping: evaluation %r does not run before the end, so nothing '
                'can stop earlier',
                name,
            )


def warn_of_best(experiment: Experiment, events: Events) -> None:
    """Warns if `config.checkpoint.best` has too few steps that are both evaluated and saved.

    A checkpoint is judged by an evaluation at the same step.
    """
    metric = experiment.saving.retention.best_metric
    if metric is None:
        return
    name, total = metric.split('/')[1], experiment.training.total_steps
    evals, save = events.evals[name], events.save
    at_end, first = name in events.evals_due(total), evals.next_due(0)
    if at_end and (first is None or first >= total):
        return  # The only evaluation is at the end, which is saved.
    if _meet_before(evals, save, total):
        return
    periods = (
        f'config.evals.{name}.every={str(experiment.evals[name].every)!r}',
        f'config.checkpoint.every={str(experiment.saving.every)!r}',
    )
    wanted = periods[0].partition('=')[2]
    fix = f'set --config.checkpoint.every={wanted}'
    if evals.period_steps is None or evals.period_steps > total:
        fix = f'set --config.evals.{name}.every={periods[1].partition("=")[2]}'
        if save.period_steps is None or save.period_steps > total:
            fix = f'leave out config.evals.{name}.final=False'
    elif not at_end:
        fix += f', or leave out config.evals.{name}.final=False'
    _log.warning(
        'config.checkpoint.best: %s. %s and %s have no step in common before the end of this run '
        '(%d steps), and a checkpoint is judged by an evaluation at the same step: %s',
        'only the last checkpoint can be the best' if at_end else 'no checkpoint can be the best',
        *periods,
        total,
        fix,
    )


def _meet_before(one: Periodic, other: Periodic, end: int) -> bool:
    """Whether two events are due at the same step before `end`."""
    if one.period_steps is None or other.period_steps is None:
        return False
    rare, often = sorted((one, other), key=lambda each: each.period_steps or 0, reverse=True)
    step = rare.next_due(0)
    while step is not None and step < end:
        if often.due(step):
            return True
        step = rare.next_due(step)
    return False


def watched_metrics(experiment: Experiment) -> dict[str, str]:
    """Returns the metrics that decide something, by the config path that names each."""
    early, best = experiment.training.early_stopping, experiment.saving.retention.best_metric
    found = {'config.early_stopping.metric': early.metric if early else None}
    found['config.checkpoint.best.metric'] = best
    return {path: metric for path, metric in found.items() if metric is not None}
