# SPDX-License-Identifier: Apache-2.0
"""What an experiment runs with, and what can be done with it besides training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from trainer import startup
from trainer.checkpoint.manager import Checkpoints
from trainer.config.errors import UserError
from trainer.evaluate.evaluator import Evaluator
from trainer.events import Events
from trainer.experiment import Experiment
from trainer.inputs import fingerprint
from trainer.parallel import processes
from trainer.parallel.mesh import batch_shards, make_mesh
from trainer.parallel.sharding import check_rules
from trainer.prefetch import Prefetcher
from trainer.probe import products
from trainer.probe.probes import Probes
from trainer.step import varied
from trainer.step.ensemble import EnsembleStep, member_state
from trainer.step.program import Program, Programs
from trainer.step.state import TrainState
from trainer.step.train_step import TrainStep
from trainer.transfer.start import start
from trainer.workdir import Workdir, versions


class Parts:
    """Mesh, programs, evaluators and checkpoints of an experiment, each made at its first use.

    Attributes:
        experiment: what is trained.
        workdir: the run's directory, or None: then nothing is written.
    """

    def __init__(self, experiment: Experiment, workdir: str | None = None):
        """Names the parts; nothing is made or compiled yet.

        Args:
            experiment: from `trainer.experiment.build`.
            workdir: where checkpoints, metrics and results go; None leaves no trace.
        """
        self.experiment = experiment
        self.workdir = None if workdir is None else Workdir(workdir)
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
        member = TrainStep(
            model=experiment.model,
            task=experiment.task,
            optimizer=experiment.optimizer,
            seed=experiment.seed,
            function=experiment.step,
            accumulate=experiment.accumulate,
            ema_decay=experiment.ema_decay,
            loss_scale=experiment.loss_scale,
            shards=shards,
            log=self._events.log,
            last_step=experiment.total_steps,
        )
        train_step: TrainStep | EnsembleStep = member
        if experiment.ensemble is not None:
            train_step = EnsembleStep.of(member, experiment.ensemble, self.mesh)
        spec = startup.abstract_batch(experiment.data.spec)
        programs = Programs(
            train_step,
            spec,
            self.mesh,
            sharding=experiment.sharding,
            fused=experiment.steps_per_call,
        )
        startup.warn_of_slices(experiment, programs.abstract)
        startup.warn_of_idle_axes(experiment, programs.abstract, self.mesh)
        return programs

    @functools.cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        """One evaluator for each entry of `config.evals`; each compiles at its first batch."""
        return {
            name: Evaluator.of(name, spec, self.experiment, self.mesh)
            for name, spec in self.experiment.evals.items()
        }

    @functools.cached_property
    def checkpoints(self) -> Checkpoints | None:
        """The work directory's checkpoints, or None without one."""
        if self.workdir is None:
            return None
        return Checkpoints(self.workdir.checkpoints, self.experiment.retention)

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
            startup.warn_of_wrong_gradients(self.programs.abstract, self.mesh)
        programs = [self.programs.fused] if self.experiment.steps_per_call > 1 else []
        programs.append(self.programs.step)
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
        data = self.experiment.data
        return Prefetcher.on_mesh(
            data.block,
            calls,
            self.mesh,
            self.experiment.clock.batch_size,
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
                'which checkpoint is the best is told by a metric, and this config names none: '
                'set --config.checkpoint.best.metric, such as eval/NAME/accuracy'
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
        return self.checkpoints.restore(found, self.programs.abstract)

    def as_configured(self, state: TrainState) -> TrainState:
        """Returns a restored state with the numbers that `config.ensemble.vary` has now."""
        ensemble = self.experiment.ensemble
        if ensemble is None:
            return state
        opt_state = varied.written(state.opt_state, ensemble.values)
        return dataclasses.replace(state, opt_state=opt_state)

    def model(self, state: TrainState | None = None, *, member: int | None = None) -> Any:
        """Returns the user's own model with trained variables in it, to call in a notebook.

        It is in evaluation mode: a Linen module as a bound Klinen model (`trainer.modules.klinen`),
        an NNX module as it is.

        Args:
            state: whose variables; by default the newest checkpoint's.
            member: of an ensemble, which one.

        Raises:
            UserError: for an ensemble without a member.
        """
        state = self.restore() if state is None else state
        if self.experiment.ensemble is not None:
            if member is None:
                raise UserError('model: an ensemble has many; name one, as in model(member=0)')
            state = member_state(state, member)
        return self.experiment.model.for_notebook(state.variables)

    def evaluate(self, state: TrainState | None = None) -> dict[str, dict[str, float]]:
        """Returns the metrics of each evaluation of the config.

        Args:
            state: what to evaluate; by default the newest checkpoint.
        """
        state = self.restore() if state is None else state
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
        state = self.restore() if state is None else state
        return self.evaluators[evaluation].predict(state)
