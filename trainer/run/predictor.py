# SPDX-License-Identifier: Apache-2.0
"""The uses of a run besides training: set-up, restoring, evaluation, prediction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh

from trainer.config.errors import UserError
from trainer.experiment import Experiment
from trainer.parallel.mesh import make_mesh
from trainer.run import agreement, evaluators, restore, setup
from trainer.step import donated
from trainer.step.state import TrainState
from trainer.tasks.measured import MetricValues


class Predictor:
    """Restores, evaluates and predicts with one experiment in one work directory.

    `Trainer` is a subclass that also trains.

    Attributes:
        run: its experiment, directory and checkpoints, which are attributes of their own too.
        experiment: what is trained; not the one passed in if a checkpoint has another batch size.
        workdir: the run's directory, or None if nothing is written.
        checkpoints: those of the work directory, or None without one.
    """

    def __init__(
        self, experiment: Experiment, workdir: str | None = None, *, mesh: Mesh | None = None
    ):
        """Opens a run; nothing is compiled before a method is called.

        Args:
            experiment: what `trainer.experiment.build` returned.
            workdir: where its checkpoints are; None without any.
            mesh: used instead of that of `config.mesh`, which covers all devices.
        """
        self.run = run = setup.open_run(experiment, workdir)
        self.experiment, self.workdir = run.experiment, run.workdir
        self.checkpoints = run.checkpoints
        self._mesh = mesh
        self._setup: setup.Setup | None = None

    def set_up(self) -> setup.Setup:
        """Returns mesh, programs and evaluators; the first call creates and checks them.

        Raises:
            UserError: if model, task, data and optimizer are not compatible.
        """
        if self._setup is None:
            self._setup = setup.set_up(self.experiment, self.run.events.log, self.mesh())
        return self._setup

    def mesh(self) -> Mesh:
        """Returns the device mesh, created by the first call.

        Raises:
            UserError: if `config.mesh` does not fit the devices.
        """
        if self._mesh is None:
            self._mesh = make_mesh(self.experiment.devices.mesh)
        return self._mesh

    def check_agreement(self) -> None:
        """Checks that all processes run the same thing; each of them must call this.

        Raises:
            UserError: in every process, naming what differs: config, versions, data or checkpoints.
        """
        if jax.process_count() > 1:
            # First, since `set_up` traces: a difference could make tracing fail in one process.
            agreement.check_run(self.experiment, self.workdir, self.checkpoints)
            agreement.check_evaluations(self.set_up().evaluators)

    def init_state(self) -> TrainState:
        """Returns the initial state of a run; each leaf is created directly on its devices.

        Raises:
            UserError: if the weights of `config.init_from` do not fit the model.
        """
        return restore.init_state(self.experiment, self.set_up().programs)

    def restore(self, step: int | str = 'latest') -> TrainState:
        """Returns the state of a checkpoint of the work directory.

        Args:
            step: a number, 'latest' or 'best'.

        Raises:
            UserError: if there is no such checkpoint.
            CheckpointError: if its arrays are damaged.
        """
        return restore.restore_chosen(
            self.experiment, self.workdir, self.checkpoints, self.set_up().programs, step
        )

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters to evaluate, as given by `config.optimizer.eval_params`.

        Args:
            state: train state; for an ensemble, that of all members.
        """
        return setup.eval_params(self.experiment, self.set_up().programs, state)

    def model(self, state: TrainState | None = None, *, member: int | None = None) -> Any:
        """Returns the model with trained variables, to call in a notebook.

        It does not train (no dropout): a Linen module is returned as a bound Klinen model
        (`trainer.klinen`), an NNX module as itself. Its parameters are those of `eval_params`.

        Args:
            state: state to take the variables from; by default the newest checkpoint.
            member: index of the member, for an ensemble.

        Raises:
            UserError: if the run is an ensemble and no member is given.
        """
        state = self._resolve_state(state, 'model(state)')
        return evaluators.bind_model(self.experiment, state, self.eval_params, member)

    @overload
    def evaluate(
        self, state: TrainState | None = None, *, evaluation: str | None = None
    ) -> dict[str, MetricValues]: ...
    @overload
    def evaluate(
        self, state: TrainState | None = None, *, data: Any, evaluation: str | None = None
    ) -> MetricValues: ...
    def evaluate(
        self, state: TrainState | None = None, *, data: Any = None, evaluation: str | None = None
    ) -> Any:
        """Returns the metrics of each evaluation in the config, or those of other data.

        Args:
            state: state to evaluate; by default the newest checkpoint.
            data: other data: a dict of arrays (examples, ...) or a source, the same in every
                process.
            evaluation: run only this evaluation; with `data`, the one whose task, transforms and
                batch size to use. By default those of the only evaluation, or of training if there
                is none.

        Returns:
            Metrics by the name of the evaluation; for `data`, its metrics alone. They are numbers
            by name, and `arrays`.
        """
        state = self._resolve_state(state, 'evaluate(state)')
        if data is not None:
            return self.set_up().other_data.evaluate(state, data, evaluation)
        setup = self.set_up()
        names = setup.evaluators if evaluation is None else [evaluation]
        return {name: setup.evaluator(name, 'evaluate').run(state) for name in names}

    @overload
    def predict(
        self, data: str, state: TrainState | None = None
    ) -> Iterator[dict[str, np.ndarray]]: ...
    @overload
    def predict(
        self, data: Any, state: TrainState | None = None, *, evaluation: str | None = None
    ) -> dict[str, np.ndarray]: ...
    def predict(
        self, data: Any, state: TrainState | None = None, *, evaluation: str | None = None
    ) -> Any:
        """Returns the task's predictions for a split of the config, or for other data.

        They are what the task's method `predict` returns. For a task without one, they are the
        output of the model: an array under 'output', the entries of a dict under their names. The
        data then needs all fields that the task reads.

        Args:
            data: the name of an evaluation, whose split is predicted; or other data, as in
                `evaluate`.
            state: state to predict with; by default the newest checkpoint.
            evaluation: as in `evaluate`.

        Returns:
            For a split, an iterator over the predictions of each batch, padding removed. For other
            data, the predictions for all of its examples, by name. Of several processes, only the
            main process gets fields of the batch that `predict` returns unchanged.

        Raises:
            UserError: if a task without a method `predict` calls the model not exactly once, or its
                output does not have one entry for each example.
        """
        state = self._resolve_state(state, 'predict(state)')
        if isinstance(data, str):
            return self.set_up().evaluator(data, 'predict').predict(state)
        return self.set_up().other_data.predict(state, data, evaluation)

    def _resolve_state(self, state: TrainState | None, what: str) -> TrainState:
        """Returns the state, or that of the newest checkpoint.

        Raises:
            UserError: if the state is something else, or there is neither it nor a checkpoint.
            DonatedError: if it was donated to a step.
        """
        if not isinstance(state, (TrainState, type(None))):
            raise UserError(
                f'{what}: expected a training state, such as that of a result, got a '
                f'{type(state).__name__}. The order is evaluate(state, data=arrays), and '
                'predict(arrays, state)'
            )
        donated.check(state, what)
        if state is None and self.checkpoints is None:
            raise UserError(
                f'{what}: this Trainer has no work directory, so it has no checkpoint; pass a '
                'state, such as that of a result'
            )
        return self.restore() if state is None else state
