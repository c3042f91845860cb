# SPDX-License-Identifier: Apache-2.0
"""What is derived once before the loop: shapes, checks, and the summary that the user sees."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from trainer import compat
from trainer.config.durations import Periodic
from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.input.fields import MASK
from trainer.modules.model_view import param_path
from trainer.observe.table import bytes_per_device, human_bytes, parameter_table
from trainer.parallel.mesh import BATCH_AXES, batch_shards
from trainer.parallel.sharding import logical_rules
from trainer.run.events import Events
from trainer.step.programs import Programs
from trainer.step.state import TrainState

if TYPE_CHECKING:
    from trainer.run.setup import Parts

_log = logging.getLogger('trainer')


def check_batch(experiment: Experiment, shards: int) -> None:
    """Checks that a batch divides over devices and accumulation slices.

    Raises:
        UserError: naming batch sizes that would.
    """
    rows, parts = experiment.clock.batch_size, shards * experiment.accumulate
    if rows % parts == 0:
        return
    below, above = rows // parts * parts, -(-rows // parts) * parts
    near = f'{above}' if below == 0 else f'{below} or {above}'
    raise UserError(
        f'config.data.batch_size: {rows} rows do not divide over {shards} devices x '
        f'{experiment.accumulate} accumulation slices; {near} would'
    )


def warn_of_slices(experiment: Experiment, state: TrainState) -> None:
    """Says that batch statistics are those of slices, where a batch is cut into some."""
    if experiment.accumulate > 1 and 'batch_stats' in state.collections:
        _log.warning(
            'the model has batch statistics and config.accumulate=%d: each slice is normalised by '
            'its own, so the update is not quite that of the whole batch',
            experiment.accumulate,
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
    for _, axes in logical_rules(experiment.sharding):
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
    total = experiment.total_steps
    late = []
    if experiment.profile is not None and experiment.profile.start >= total:
        late.append('config.profile')
    for name, capture in experiment.captures.items():
        first = capture.every.next_due(0)
        if first is not None and first > total:
            late.append(f'config.capture.{name}')
    if late:
        _log.warning('%s: never comes in a run of %d steps', ', '.join(late), total)
    if (early := experiment.early_stopping) is not None:
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
    metric = experiment.retention.best_metric
    if metric is None:
        return
    name, total = metric.split('/')[1], experiment.total_steps
    evals, save = events.evals[name], events.save
    at_end, first = name in events.evals_due(total), evals.next_due(0)
    if at_end and (first is None or first >= total):
        return  # The only evaluation is at the end, which is saved.
    if _meet_before(evals, save, total):
        return
    periods = (
        f'config.evals.{name}.every={str(experiment.evals[name].every)!r}',
        f'config.checkpoint.every={str(experiment.save_every)!r}',
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


def explain_out_of_memory(parts: Parts, error: Exception) -> str:
    """Returns what fills a device's memory, and what would help."""
    state, spec = parts.programs.abstract, parts.programs.fields.shapes
    batch = sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values())
    lines = [
        'the device is out of memory.',
        f'  state        {human_bytes(bytes_per_device(state))} on each device (parameters '
        f'{human_bytes(bytes_per_device(state.params))}, '
        f'optimizer {human_bytes(bytes_per_device(state.opt_state))})',
        f'  batch        {human_bytes(batch / batch_shards(parts.mesh))} on each device',
    ]
    temporary = parts.programs.step.temporary_bytes()
    if temporary is not None:
        lines.append(f'  temporaries  {human_bytes(temporary)} in the train step')
    lines += [
        'A smaller config.data.batch_size or a larger config.accumulate shrinks the temporaries; '
        'a smaller model or a leaner optimizer shrinks the state.',
        f'The runtime said: {compat.runtime_reason(error)}',
    ]
    return '\n'.join(lines)


def summary(parts: Parts, step: int) -> str:
    """Returns what a run that starts at `step` says of itself."""
    experiment, state = parts.experiment, parts.programs.abstract
    devices = jax.devices()
    shards = batch_shards(parts.mesh)
    mesh = ' x '.join(f'{name} {size}' for name, size in parts.mesh.shape.items())
    per_epoch = experiment.clock.steps_per_epoch
    batch = experiment.clock.batch_size
    workdir = 'none (nothing is written)' if parts.workdir is None else parts.workdir.path
    lines = [
        parameter_table(state.params, state.collections),
        '',
        f'devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), mesh {mesh}',
        f'state     {human_bytes(bytes_per_device(state))} on each device',
        f'batch     {batch} rows, {batch // shards} on each device',
        f'length    {experiment.total_steps:,} steps'
        + (f', {float(per_epoch):,.6g} steps per epoch' if per_epoch else '')
        + (' at the current batch size' if per_epoch and experiment.clock.progress else ''),
        f'workdir   {workdir}',
        f'start     {_start(experiment, step)}',
    ]
    if (ensemble := experiment.ensemble) is not None:
        members = [f'member {i}  {ensemble.describe(i)}' for i in range(ensemble.size)]
        lines += [f'ensemble  {ensemble.size} members', *(f'  {member}' for member in members)]
    return '\n'.join(lines)


def watched_metrics(experiment: Experiment) -> dict[str, str]:
    """Returns the metrics that decide something, by the config path that names each."""
    early, best = experiment.early_stopping, experiment.retention.best_metric
    found = {'config.early_stopping.metric': early.metric if early else None}
    found['config.checkpoint.best.metric'] = best
    return {path: metric for path, metric in found.items() if metric is not None}


def _start(experiment: Experiment, step: int) -> str:
    if step > 0:
        return f'resumed from step {step:,}'
    weights = experiment.init_from
    if weights is None:
        return 'from the beginning'
    member = '' if weights.member is None else f'member {weights.member} of '
    return f'from the beginning, with weights of {member}{weights.path}'
