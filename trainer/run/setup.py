# SPDX-License-Identifier: Apache-2.0
"""What an experiment runs with, and what can be done with it besides training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from trainer.build.data import fingerprint
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manager import Checkpoints
from trainer.config.errors import UserError
from trainer.ensemble import hyperparams
from trainer.ensemble.step import EnsembleStep, member_state
from trainer.evaluate.evaluator import Evaluator
from trainer.experiment import Experiment
from trainer.input.prefetch import Prefetcher
from trainer.inspect import products
from trainer.inspect.monitors import Probes
from trainer.observe.reporter import check_row
from trainer.parallel import processes
from trainer.parallel.host import fetch
from trainer.parallel.mesh import batch_shards, make_mesh
from trainer.parallel.sharding import check_rules
from trainer.run import startup
from trainer.run.batch_sizes import BatchSizes
from trainer.run.events import Events
from trainer.run.workdir import Workdir, versions
from trainer.step import combinations, donated, eval_point, health
from trainer.step.context import StepContext
from trainer.step.one_model import TrainStep
from trainer.step.programs import Program, Programs
from trainer.step.state import TrainState
from trainer.step.train_step import default_step
from trainer.tasks.measured import Measured
from trainer.weights.first_state import start


class Parts:
    """Mesh, programs, evaluators and checkpoints of an experiment, each made at its first use.

    Attributes:
        experiment: what is trained.
        workdir: the run's directory, or None: then nothing is written.
        batch_sizes: those of the run so far, and the experiment's.
    """

    def __init__(self, experiment: Experiment, workdir: str | None = None):
        """Names the parts; nothing is made or compiled yet.

        Args:
            experiment: from `trainer.experiment.build`.
            workdir: where checkpoints, metrics and results go; None leaves no trace.
        """
        self.workdir = None if workdir is None else Workdir(workdir)
        self.batch_sizes = BatchSizes.of_run(self.workdir, experiment.clock.batch_size)
        self._refusal: UserError | None = None
        try:
            # Here and not when training starts: the compiled programs depend on it.
            experiment = experiment.after(self.batch_sizes.parts)
        except UserError as error:
            self._refusal = error  # Raised in training only: evaluations do not need it.
        self.experiment = experiment
        self._events = Events.of(experiment)
        self._warned = False

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh."""
        return make_mesh(self.experiment.mesh)

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs of training; each compiles when it is first asked for."""
        experiment, shards = self.experiment, batch_shards(self.mesh)
        check_rules(experiment.sharding, self.mesh)
        context = StepContext(
            model=experiment.model,
            task=experiment.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            accumulate=experiment.accumulate,
            ema_decay=experiment.ema_decay,
            loss_scale=experiment.loss_scale,
            shards=shards,
            log=self._events.log,
            last_step=experiment.total_steps,
            watches=experiment.guard == 'stop',
            sweeps=self.mesh.devices.flat[0].platform != 'cpu',
        )
        member = TrainStep(context, experiment.step)
        train_step: TrainStep | EnsembleStep = member
        if experiment.ensemble is not None:
            train_step = EnsembleStep.of(member, experiment.ensemble, self.mesh)
        programs = Programs(
            train_step,
            experiment.data.spec,
            self.mesh,
            sharding=experiment.sharding,
            fused=experiment.steps_per_call,
        )
        opt_state = programs.abstract.opt_state
        combinations.check(
            experiment.optimizer,
            opt_state,
            ema=experiment.ema_decay is not None,
            own_step=experiment.step is not default_step,
        )
        combinations.warn_of_eval_point(experiment.optimizer, opt_state)
        startup.warn_of_slices(experiment, programs.abstract)
        startup.warn_of_rows_that_do_not_count(programs)
        startup.warn_of_idle_axes(experiment, programs.abstract, self.mesh)
        return programs

    @functools.cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """One evaluator for each entry of `config.evals`; each compiles at its first batch."""
        return {
            name: Evaluator.of(name, spec, self.experiment, self.mesh, self.eval_params)
            for name, spec in self.experiment.evals.items()
        }

    @functools.cached_property
    def checkpoints(self) -> Checkpoints | None:
        """The work directory's checkpoints, or None without one."""
        if self.workdir is None:
            return None
        return Checkpoints(
            self.workdir.checkpoints, self.experiment.retention, self.workdir.mark_saved
        )

    def check_agreement(self) -> None:
        """Makes sure that the processes of a run do the same; all of them must call it.

        Raises:
            UserError: in every process, naming what differs: config, versions, data or checkpoints.
        """
        if jax.process_count() == 1:
            return
        splits = {name: fingerprint(e.loader) for name, e in self.evaluators.items()}
        workdir, checkpoints = self.workdir, self.checkpoints
        processes.check_agreement(
            {
                'config': self.experiment.config,
                'versions': versions(),
                'data': fingerprint(self.experiment.data),
                'data of evals': splits,
                'workdir': None if workdir is None else str(workdir.path),
                'newest checkpoint': None if checkpoints is None else checkpoints.latest(),
            }
        )

    def check_batch_sizes(self) -> None:
        """Checks that the run can resume with the batch size of the experiment.

        Raises:
            UserError: if its schedules or its loader cannot, or if another Trainer has changed it.
        """
        if self._refusal is not None:
            raise self._refusal
        now = BatchSizes.of_run(self.workdir, self.experiment.clock.batch_size)
        if now != self.batch_sizes and self.workdir is not None:
            raise UserError(
                f'the batch size of the run in {self.workdir.path} has changed since this Trainer '
                'was created; create a new one'
            )

    def compile(self) -> list[Program]:
        """Starts compiling what training calls; checks the evaluations while that goes on.

        Returns:
            The programs; their `ready()` waits for the compiler.

        Raises:
            UserError: for what only shows now, such as a batch that does not divide over the mesh
                or an evaluation of an empty split.
        """
        startup.check_batch(self.experiment, batch_shards(self.mesh))
        first = not self._warned
        if first:
            self._warned = True
            startup.warn_of_what_never_comes(self.experiment)
            startup.warn_of_best(self.experiment, self._events)
            startup.warn_of_wrong_gradients(self.programs.abstract, self.mesh)
        programs = []
        if eval_point.is_named(self.experiment.optimizer):
            programs.append(self.programs.eval_params)
        if self.experiment.steps_per_call > 1:
            programs.append(self.programs.fused)
        programs.append(self.programs.step)
        check_row(self.programs.abstract.metrics)
        if first:
            products.warn_of_other_dtypes(self.programs, self.experiment.model)
        for evaluator in self.evaluators.values():
            evaluator.prepare(self.programs.abstract)
        for path, metric in startup.watched_metrics(self.experiment).items():
            _, evaluation, name = metric.split('/', 2)
            self.evaluators[evaluation].check_metric(name, path)
        Probes(self).prepare()
        return programs

    def batches(self, start: int, calls: Iterable[int]) -> Prefetcher:
        """Returns training batches from a position on, each of so many steps as `calls` says."""
        data, batch_size = self.experiment.data, self.experiment.clock.batch_size
        if start < self.batch_sizes.parts[-1][0] and not hasattr(data, 'restore'):
            # From an older checkpoint: as if the run resumed from there.
            data = data.after(self.batch_sizes.going_on(start, batch_size).parts)
        return Prefetcher.on_mesh(
            data.block,
            calls,
            self.mesh,
            batch_size,
            fields=self.programs.fields,
            start=start,
            depth=self.experiment.prefetch,
            release=getattr(data, 'close', None),  # A loader may have threads or processes to end.
        )

    def init_state(self) -> TrainState:
        """Returns the first state of a run, every leaf born on the devices that hold it.

        Raises:
            UserError: if the weights of `config.init_from` do not fit the model.
        """
        experiment = self.experiment
        return start(
            self.programs.init(),
            experiment.init_from,
            experiment.surgery,
            restarted=lambda state: self.programs.restarted(state),
            members=experiment.ensemble is not None,
        )

    def restore(self, step: int | str = 'latest') -> TrainState:
        """Returns the state of a checkpoint of the work directory.

        Args:
            step: a number, 'latest' or 'best'.

        Raises:
            UserError: if there is no such checkpoint.
            CheckpointError: if its arrays are not those that were saved.
        """
        if self.checkpoints is None:
            raise UserError('restore: this trainer has no work directory')
        if step == 'best' and self.experiment.retention.best_metric is None:
            raise UserError(
                "step 'best' needs a metric, and this config names none: add "
                '--config.checkpoint.best.metric=eval/NAME/accuracy'
            )
        if self.workdir is not None and not self.workdir.path.exists():
            raise UserError(f'there is no run in {self.workdir.path}')
        steps = self.checkpoints.steps()
        named = {'latest': self.checkpoints.latest, 'best': self.checkpoints.best}
        number = int(step) if str(step).isascii() and str(step).isdigit() else None
        found = named[str(step)]() if step in named else number
        if found is None or found not in steps:
            have = ', '.join(map(str, steps)) or 'none'
            raise UserError(
                f'no checkpoint {step!r} in {self.checkpoints.directory}; there: {have}'
            )
        state = self.checkpoints.restore(found, self.programs.abstract)
        if self.experiment.ensemble is None:
            return state
        # An evaluation leaves out members that have diverged.
        kept = self.checkpoints.meta(found).get('health')
        return state if kept is None else _with_health(state, self._clean_health(), kept)

    def _clean_health(self) -> health.Health | None:
        """Returns the health of a finite state; None if the run does not look at it."""
        abstract = self.programs.abstract.health
        if abstract is None:
            return None
        zeros = np.zeros(abstract.packed.shape, np.int32)
        return health.Health(jax.device_put(zeros, abstract.packed.sharding))

    def examined(self, state: TrainState, kept: Any = None) -> TrainState:
        """Returns a restored state with the health to resume from.

        Args:
            state: fresh, or of a checkpoint.
            kept: what `health.kept` returned when it was saved.

        Raises:
            CheckpointError: if that is of another shape.
        """
        found = self._clean_health()
        if found is None:
            return state
        state = dataclasses.replace(state, health=found)
        if self.experiment.ensemble is not None or fetch(self.programs.sweep(state).kind):
            found = self.programs.examine(state.durable)  # Mostly there is nothing to count.
        return _with_health(state, found, kept)

    def as_configured(self, state: TrainState) -> TrainState:
        """Returns a restored state with the numbers that `config.ensemble.vary` has now."""
        ensemble = self.experiment.ensemble
        if ensemble is None:
            return state
        opt_state = hyperparams.written(state.opt_state, ensemble.values)
        return dataclasses.replace(state, opt_state=opt_state)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters of a state that are evaluated: see `config.optimizer.eval_params`.

        Args:
            state: with all its members, if the run is an ensemble.
        """
        if not eval_point.is_named(self.experiment.optimizer):
            return state.params
        return self.programs.eval_params(dataclasses.replace(state.durable, metrics=None))

    def model(self, state: TrainState | None = None, *, member: int | None = None) -> Any:
        """Returns the user's own model with trained variables in it, to call in a notebook.

        It is in evaluation mode: a Linen module as a bound Klinen model (`trainer.klinen`),
        an NNX module unchanged. Its parameters are those that are evaluated.

        Args:
            state: whose variables; by default the newest checkpoint's.
            member: of an ensemble, which one.

        Raises:
            UserError: for an ensemble without a member.
        """
        if self.experiment.ensemble is not None and member is None:
            raise UserError('model: choose a member of the ensemble, as in model(member=0)')
        state = self._usable(state, 'model(state)')
        state = dataclasses.replace(state, params=self.eval_params(state))
        if self.experiment.ensemble is not None:
            assert member is not None
            state = member_state(state, member)
        return self.experiment.model.for_notebook(state.variables)

    def evaluate(self, state: TrainState | None = None) -> dict[str, Measured]:
        """Returns the metrics of each evaluation of the config: numbers by name, and `arrays`.

        Args:
            state: what to evaluate; by default the newest checkpoint.
        """
        state = self._usable(state, 'evaluate(state)')
        return {name: evaluator.run(state) for name, evaluator in self.evaluators.items()}

    def predict(
        self, evaluation: str, state: TrainState | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the task's predictions for each batch of an evaluation's split, padding removed.

        Args:
            evaluation: its name in the config.
            state: whose predictions; by default the newest checkpoint's.

        Raises:
            UserError: if the task has no method `predict`.
        """
        state = self._usable(state, 'predict(state)')
        return self.evaluators[evaluation].predict(state)

    def _usable(self, state: TrainState | None, what: str) -> TrainState:
        """Returns a state, or the newest checkpoint's; refuses one that is gone."""
        donated.check(state, what)
        return self.restore() if state is None else state


def _with_health(state: TrainState, clean: health.Health | None, kept: Any) -> TrainState:
    """Returns a state with its health, given what `health.kept` returned when it was saved."""
    if clean is None:
        return state
    try:
        return dataclasses.replace(state, health=health.restored(clean, kept))
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint of step {int(fetch(state.step)):,} is damaged: 'health' of its "
            f'metadata: {error}. Remove its directory to resume from an older one.'
        ) from error
