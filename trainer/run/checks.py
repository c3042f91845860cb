# SPDX-License-Identifier: Apache-2.0
"""Checks at the start of a run: inconsistent settings, and settings that have no effect."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

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
    """Checks that the batch size is a multiple of devices times micro-batches.

    Raises:
        UserError: naming the nearest batch sizes that are.
    """
    size, divisor = experiment.clock.batch_size, shards * experiment.training.accumulate
    if experiment.data.num_shapes is not None:
        _check_whole_batches(experiment, shards)
        return
    if size % divisor == 0:
        return
    # 0 is a multiple too, but no batch size.
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    nearest = f'{above}' if below == 0 else f'{below} or {above}'
    devices = f'{shards} device{"s" if shards != 1 else ""}'
    parts = experiment.training.accumulate
    micro_batches = f'{parts} micro-batch{"es" if parts != 1 else ""}'
    raise UserError(
        f'config.data.batch_size={size} is not divisible by {devices} x {micro_batches} '
        f'(config.accumulate); use {nearest}'
    )


def _check_whole_batches(experiment: Experiment, shards: int) -> None:
    """Checks what a run does with batches that its source collates.

    Raises:
        UserError: for fused steps with several shapes, and for micro-batches of batches that cannot
            be divided.
    """
    data, training = experiment.data, experiment.training
    rows, parts = data.rows(experiment.clock.batch_size), training.accumulate
    if training.steps_per_call > 1 and (data.num_shapes or 1) > 1:
        raise UserError(
            f'config.steps_per_call={training.steps_per_call}: fused steps need batches of one '
            f'shape, and those of this source may have {data.num_shapes}. Set '
            '--config.steps_per_call=1, or let the source have one shape'
        )
    if parts > 1:
        other = [f'{n} {list(x.shape)}' for n, x in data.spec.items() if x.shape[:1] != (rows,)]
        if other or rows % (shards * parts):
            why = f'it has {rows} examples'
            if other:
                why = f'{other[0]} does not have one entry for each example'
            raise UserError(
                f'config.accumulate={parts}: a batch of this source cannot be divided into {parts} '
                f'micro-batches on {shards} device{"s" if shards != 1 else ""}: {why}. Set '
                '--config.accumulate=1, and a smaller config.data.batch_size to save memory'
            )
    if rows % shards:
        _log.warning(
            'config.data.batch_size: a batch has %d examples with padding, which do not divide '
            'evenly over %d devices: arrays with one entry for each example are replicated. '
            'Batch sizes such as %d do',
            *(rows, shards, experiment.clock.batch_size + -rows % shards),
        )


def check_programs(experiment: Experiment, programs: Programs, mesh: Mesh) -> None:
    """Checks the traced train state, and warns of suspicious settings.

    Raises:
        UserError: if the optimizer cannot be combined with other keys of the config.
    """
    state = programs.abstract
    combinations.check(
        experiment.optimizer,
        state.opt_state,
        ema=experiment.training.ema_decay is not None,
        is_custom_step=experiment.step is not default_step,
    )
    combinations.warn_about_eval_params(experiment.optimizer, state.opt_state)
    warn_of_micro_batch_stats(experiment, state)
    if experiment.data.num_shapes is None:
        warn_of_padding_in_batch_stats(programs)
    else:
        warn_of_padding_of_whole_batches(experiment, state)
    warn_of_idle_axes(experiment, state, mesh)


def warn_at_start(experiment: Experiment, events: Events, state: TrainState, mesh: Mesh) -> None:
    """Warns of settings without effect, and of a sharding that may yield wrong gradients."""
    warn_of_unreachable_events(experiment)
    warn_of_collecting_metrics(experiment)
    warn_of_best(experiment, events)
    warn_of_wrong_gradients(state, mesh)


def warn_of_micro_batch_stats(experiment: Experiment, state: TrainState) -> None:
    """Warns that micro-batches are normalized one by one, if the model has batch statistics."""
    if experiment.training.accumulate > 1 and 'batch_stats' in state.collections:
        _log.warning(
            'the model has batch statistics and config.accumulate=%d: each micro-batch is '
            'normalized by its own statistics, so the update differs slightly from that of the '
            'whole batch',
            experiment.training.accumulate,
        )


def warn_of_padding_in_batch_stats(programs: Programs) -> None:
    """Warns that batch statistics include examples of weight 0, if there may be any."""
    if 'batch_stats' not in programs.abstract.collections:
        return
    why = []
    if MASK in programs.fields.sent:
        why.append("config.data.remainder='pad'")
    if programs.task.is_weighted:
        why.append('a task that returns weights')
    if why:
        _log.warning(
            'the model has batch statistics, and examples may have weight 0 (%s): in the '
            'statistics, each of them counts as a copy of an example with nonzero weight',
            ' and '.join(why),
        )


def warn_of_padding_of_whole_batches(experiment: Experiment, state: TrainState) -> None:
    """Warns that batch statistics may include padding that every batch has."""
    size = experiment.clock.batch_size
    # Only Linen has modules without variables, whose attributes are known before they are called.
    module = getattr(experiment.model, 'module', None)
    if getattr(module, 'masks_padding', False):
        return
    if 'batch_stats' in state.collections and experiment.data.rows(size) > size:
        _log.warning(
            'the model has batch statistics, and each batch has padding, which counts in them if '
            'the model does not leave it out: nn.BatchNorm takes a mask. If it does, set '
            'masks_padding = True on the class of the model'
        )


def warn_of_idle_axes(experiment: Experiment, state: TrainState, mesh: Mesh) -> None:
    """Warns of mesh axes that shard neither the batch nor any array: their devices repeat work.

    Axes in rules by name are exempt, because activations may be sharded over them.
    """
    used = set(BATCH_AXES)
    # An entry of a PartitionSpec is a name, a tuple of names or None; so is the target of a rule.
    for _, axes in logical_rules(experiment.devices.sharding):
        used.update((axes,) if isinstance(axes, str) else axes or ())
    for leaf in jax.tree.leaves(state):
        for axes in leaf.sharding.spec:
            used.update((axes,) if isinstance(axes, str) else axes or ())
    for name, size in mesh.shape.items():
        if size > 1 and name not in used:
            _log.warning(
                'config.mesh.%s=%d: no parameter is sharded over this axis, and batches are '
                'sharded over %s only. Unless the model shards activations over it, its devices '
                'repeat the same work',
                name,
                size,
                ' and '.join(BATCH_AXES),
            )


def warn_of_wrong_gradients(state: TrainState, mesh: Mesh) -> None:
    """Warns of shardings for which XLA on CPUs has been seen to compute wrong gradients.

    The cause is in XLA and shows in JAX alone. It needs a kernel sharded over two axes of the same
    size, a batch sharded over a third, and activations without sharding constraints.
    """
    # No other backend has shown it, and with a single shard of the batch it does not happen.
    if mesh.devices.flat[0].platform != 'cpu' or mesh.shape.get('data', 1) == 1:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        every = [(axes,) if isinstance(axes, str) else axes or () for axes in leaf.sharding.spec]
        sizes = [math.prod(mesh.shape[axis] for axis in axes) for axes in every]
        # A dimension that is not sharded has size 1, which would count as equal to another such.
        sizes = [size for size in sizes if size > 1]
        if len(set(sizes)) < len(sizes):
            _log.warning(
                '%s is sharded over two mesh axes of size %d, and batches over config.mesh.data: '
                'XLA on CPUs has been seen to compute wrong gradients for this. Constrain the '
                "model's activations with nn.with_logical_constraint or "
                'jax.lax.with_sharding_constraint',
                param_path(path),
                max(size for size in sizes if sizes.count(size) > 1),
            )
            return


def warn_of_unreachable_events(experiment: Experiment) -> None:
    """Warns of keys that have no effect because the run is too short."""
    total = experiment.training.total_steps
    late = []
    if experiment.logging.profile is not None and experiment.logging.profile.start >= total:
        late.append('config.profile')
    for name, capture in experiment.logging.captures.items():
        first = capture.every.next_due(0)
        if first is not None and first > total:
            late.append(f'config.capture.{name}')
    if late:
        _log.warning('%s: not reached in a run of %d steps', ', '.join(late), total)
    if (early := experiment.training.early_stopping) is not None:
        name = early.metric.split('/')[1]
        every = experiment.evals[name].every
        first = experiment.clock.period(every, path=f'config.evals.{name}.every').next_due(0)
        if first is None or first >= total:
            _log.warning(
                'config.early_stopping: evaluation %r does not run before the end, so the run '
                'cannot stop early',
                name,
            )


def warn_of_collecting_metrics(experiment: Experiment) -> None:
    """Warns that rows of training leave out the metrics that need all examples at once."""
    if names := [name for name, _ in experiment.task.collecting]:
        _log.warning(
            'config.task: %s needs all examples at once, so only evaluations compute it; rows of '
            'training do not have it',
            ', '.join(names),
        )


def warn_of_best(experiment: Experiment, events: Events) -> None:
    """Warns if `config.checkpoint.best` has too few steps that are both evaluated and saved.

    A checkpoint is ranked by an evaluation at the same step.
    """
    metric = experiment.saving.retention.best_metric
    if metric is None:
        return
    name, total = metric.split('/')[1], experiment.training.total_steps
    evals, save = events.evals[name], events.save
    at_end, first = name in events.evals_due(total), evals.next_due(0)
    if at_end and (first is None or first >= total):
        return  # The only evaluation is at the end, which is saved.
    if _coincide_before(evals, save, total):
        return
    periods = (
        f'config.evals.{name}.every={str(experiment.evals[name].every)!r}',
        f'config.checkpoint.every={str(experiment.saving.every)!r}',
    )
    # Saving as often as evaluating ranks every checkpoint. An evaluation that is never due before
    # the end has to become more frequent itself, unless saves are not due either.
    eval_period = periods[0].partition('=')[2]
    fix = f'set --config.checkpoint.every={eval_period}'
    if evals.period_steps is None or evals.period_steps > total:
        fix = f'set --config.evals.{name}.every={periods[1].partition("=")[2]}'
        if save.period_steps is None or save.period_steps > total:
            fix = f'leave out config.evals.{name}.final=False'
    elif not at_end:
        fix += f', or leave out config.evals.{name}.final=False'
    _log.warning(
        'config.checkpoint.best: %s. %s and %s have no step in common before the end of this run '
        '(%d steps), and a checkpoint is ranked by an evaluation at the same step: %s',
        'only the last checkpoint can be the best' if at_end else 'no checkpoint can be the best',
        *periods,
        total,
        fix,
    )


def _coincide_before(one: Periodic, other: Periodic, end: int) -> bool:
    """Whether two events are due at the same step before `end`."""
    if one.period_steps is None or other.period_steps is None:
        return False
    # Stepping through the rarer event takes fewer iterations.
    rare, often = sorted((one, other), key=lambda each: each.period_steps or 0, reverse=True)
    step = rare.next_due(0)
    while step is not None and step < end:
        if often.is_due(step):
            return True
        step = rare.next_due(step)
    return False


def watched_metrics(experiment: Experiment) -> dict[str, str]:
    """Returns the metrics that early stopping and retention watch, by config path."""
    early, best = experiment.training.early_stopping, experiment.saving.retention.best_metric
    metrics = {'config.early_stopping.metric': early.metric if early else None}
    metrics['config.checkpoint.best.metric'] = best
    return {path: metric for path, metric in metrics.items() if metric is not None}


def expect_from_hooks(experiment: Experiment, path: str, metric: str) -> bool:
    """Whether a metric that no evaluation has may come from a hook, with one line of notice."""
    # A hook with a period is not called at evaluations.
    rules = experiment.hook_rules
    hooks = [name for name in experiment.hooks if name not in rules or rules[name].every is None]
    if not hooks:
        return False
    _log.warning(
        '%s: evaluation %r has no %r; a hook (%s) must return it at each of its evaluations',
        path,
        metric.split('/')[1],
        metric.split('/', 2)[2],
        ', '.join(hooks),
    )
    return True


def check_watched(experiment: Experiment, evaluation: str, measured: Mapping[str, float]) -> None:
    """Checks that an evaluation has measured what early stopping and retention watch.

    Values that the host computes, or that hooks return, are known only after its first run.

    Raises:
        UserError: naming the metrics that there are.
    """
    prefix = f'eval/{evaluation}/'
    for path, metric in watched_metrics(experiment).items():
        if metric.startswith(prefix) and metric.removeprefix(prefix) not in measured:
            raise UserError(
                f'{path}: evaluation {evaluation!r} has no {metric.removeprefix(prefix)!r}; it has '
                f'{", ".join(measured)}'
            )
