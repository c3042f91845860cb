# SPDX-License-Identifier: Apache-2.0
"""The parts of a run: work directory, events, device mesh, programs and evaluators.

`open_run` returns the parts that need no device; `set_up` builds the mesh-dependent ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from trainer.checkpoint.manager import Checkpoints
from trainer.config.durations import Periodic
from trainer.config.errors import UserError
from trainer.ensemble.step import EnsembleStep
from trainer.evaluate.evaluator import Evaluator
from trainer.experiment import Experiment
from trainer.input.fields import Fields
from trainer.input.prefetch import Prefetcher
from trainer.parallel import processes
from trainer.parallel.mesh import batch_shards
from trainer.parallel.sharding import check_rules
from trainer.run import checks
from trainer.run.batch_sizes import BatchSizes
from trainer.run.evaluators import OtherData, check_name, make_evaluator
from trainer.run.events import Events
from trainer.run.workdir import Workdir
from trainer.step import eval_point
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.programs import Program, Programs
from trainer.step.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run before any device is used.

    Attributes:
        experiment: what is trained; after a change of the batch size, with data and schedules that
            continue where the run stopped.
        workdir: the work directory, or None to write nothing.
        checkpoints: those of the work directory, or None without one.
        batch_sizes: those of the run so far, and the experiment's.
        events: when it logs, evaluates and saves.
        refusal: why training cannot resume with this batch size, or None. Evaluations can.
    """

    experiment: Experiment
    workdir: Workdir | None
    checkpoints: Checkpoints | None
    batch_sizes: BatchSizes
    events: Events
    refusal: UserError | None

    def output_directory(self) -> epath.Path | None:
        """Returns the work directory in the main process, which writes to it; None in others."""
        if self.workdir is None or not processes.is_main_process():
            return None
        return self.workdir.path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run that depend on the devices.

    Attributes:
        mesh: the device mesh.
        programs: the training programs; each compiles when it is started or first called.
        evaluators: one for each entry of `config.evals`; each compiles at its first batch.
        other_data: evaluates and predicts data that the config does not have.
    """

    mesh: Mesh
    programs: Programs
    evaluators: Mapping[str, Evaluator]
    other_data: OtherData

    def evaluator(self, name: str, path: str) -> Evaluator:
        """Returns the evaluator of an evaluation.

        Raises:
            UserError: if there is none of this name; the message begins with `path`.
        """
        check_name(self.evaluators, name, path)
        return self.evaluators[name]


def open_run(experiment: Experiment, workdir: str | None) -> Run:
    """Returns the run of an experiment; reads the metadata of its newest checkpoint.

    Args:
        experiment: what `trainer.experiment.build` returned.
        workdir: where checkpoints, metrics and results go; None writes nothing.
    """
    directory = None if workdir is None else Workdir(workdir)
    batch_sizes = BatchSizes.from_run(directory, experiment.clock.batch_size)
    refusal: UserError | None = None
    try:
        # Before anything is traced: schedules are compiled into the programs.
        experiment = experiment.with_batch_sizes(batch_sizes.parts)
    except UserError as error:
        refusal = error
    checkpoints = None
    if directory is not None:
        checkpoints = Checkpoints(
            directory.checkpoints, experiment.saving.retention, directory.mark_saved
        )
    return Run(
        experiment=experiment,
        workdir=directory,
        checkpoints=checkpoints,
        batch_sizes=batch_sizes,
        events=Events.from_experiment(experiment),
        refusal=refusal,
    )


def set_up(experiment: Experiment, log: Periodic, mesh: Mesh) -> Setup:
    """Traces the train state, creates the evaluators and checks them; compiles nothing.

    Args:
        experiment: what is trained.
        log: when rows are written: the train step computes norms for them.
        mesh: the device mesh.

    Raises:
        UserError: if model, task, optimizer or sharding rules are inconsistent, or a split is
            empty.
    """
    check_rules(experiment.devices.sharding, mesh)
    programs = Programs(
        _train_step(experiment, log, mesh),
        experiment.data.spec,
        mesh,
        structure=experiment.data.structure,
        sharding=experiment.devices.sharding,
        fused=experiment.training.steps_per_call,
        num_shapes=experiment.data.num_shapes,
        is_collected=experiment.data.collector is not None,
    )
    checks.check_programs(experiment, programs, mesh)
    params = functools.partial(eval_params, experiment, programs)
    evaluators = {name: make_evaluator(experiment, name, mesh, params) for name in experiment.evals}
    other_data = OtherData(experiment, mesh, params)
    return Setup(mesh=mesh, programs=programs, evaluators=evaluators, other_data=other_data)


def start_compiling(experiment: Experiment, programs: Programs) -> list[Program]:
    """Starts to compile the training programs in the background, and returns them."""
    started = []
    if eval_point.has_eval_params(experiment.optimizer):
        started.append(programs.eval_params.start())
    if experiment.training.steps_per_call > 1:
        started.append(programs.fused.start())
    started.append(programs.step.start())
    return started


def prepare_evaluators(
    experiment: Experiment, evaluators: Mapping[str, Evaluator], state: TrainState
) -> None:
    """Traces the evaluations, so that mistakes in them are found before training starts.

    Args:
        experiment: names the metrics that must exist.
        evaluators: evaluators by name.
        state: the shapes of the train state.

    Raises:
        UserError: if a task or a metric is invalid, or a metric that the config names is missing.
    """
    for evaluator in evaluators.values():
        evaluator.prepare(state)
    for path, metric in checks.watched_metrics(experiment).items():
        _, evaluation, name = metric.split('/', 2)
        try:
            evaluators[evaluation].check_metric(name, path)
        except UserError:
            if not checks.expect_from_hooks(experiment, path, metric):
                raise


def training_batches(
    experiment: Experiment,
    batch_sizes: BatchSizes,
    mesh: Mesh,
    fields: Fields,
    start: int,
    calls: Iterable[int],
) -> Prefetcher:
    """Returns the training batches from a position on.

    Args:
        experiment: what is trained.
        batch_sizes: those of the run so far.
        mesh: the device mesh.
        fields: the batch fields that are sent to the devices.
        start: number of steps whose batches are already consumed.
        calls: number of steps of each call of a program.
    """
    data, batch_size = experiment.data, experiment.clock.batch_size
    if start < batch_sizes.parts[-1][0] and not data.is_stream:
        # Reading begins before the last change of the batch size, as after restoring an older
        # checkpoint: the data is laid out as if the run resumed there.
        data = data.with_batch_sizes(batch_sizes.with_size(start, batch_size).parts)
    return Prefetcher(
        data.block,
        calls,
        mesh,
        data.rows(batch_size),
        fields=fields,
        num_shapes=data.num_shapes,
        start=start,
        depth=experiment.prefetch,
        # Closed with the prefetcher, so that no worker process outlives training.
        release=data.close,
    )


def eval_params(experiment: Experiment, programs: Programs, state: TrainState) -> Any:
    """Returns the parameters to evaluate: see `config.optimizer.eval_params`.

    Args:
        experiment: what is trained.
        programs: the training programs.
        state: the train state, with all members if the run is an ensemble.
    """
    if not eval_point.has_eval_params(experiment.optimizer):
        return state.params
    return programs.eval_params(dataclasses.replace(state.durable, metrics=None))


def _train_step(experiment: Experiment, log: Periodic, mesh: Mesh) -> TrainStep | EnsembleStep:
    context = StepContext(
        model=experiment.model,
        task=experiment.task,
        optimizer=experiment.optimizer,
        seed=experiment.seed,
        accumulate=experiment.training.accumulate,
        ema_decay=experiment.training.ema_decay,
        loss_scale=experiment.training.loss_scale,
        shards=batch_shards(mesh),
        log=log,
        last_step=experiment.training.total_steps,
        tracks_health=True,
        stops=experiment.training.guard == 'stop',
        sweeps=_sweeps(mesh),
    )
    member = TrainStep(context, experiment.step, experiment.data.collector)
    if experiment.ensemble is None:
        return member
    return EnsembleStep.from_step(member, experiment.ensemble, mesh)


def _sweeps(mesh: Mesh) -> bool:
    """Returns whether each step checks all values for non-finite ones; not on CPUs, for speed only.

    There the stop guard checks them from time to time: see `StopGuard`.
    """
    # CPU time of a step of the MLP (`tests/benchmarks/beside.py OTHER mlp`, 11 pairs, jax 0.10.2):
    # 0.63 [0.49, 0.81] of that with a sweep in every step. Not measured on accelerators.
    return mesh.devices.flat[0].platform != 'cpu'
