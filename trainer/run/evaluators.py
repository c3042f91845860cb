# SPDX-License-Identifier: Apache-2.0
"""The use of a state: evaluators for splits of the config and for other data, and the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from trainer.builders.data import as_source
from trainer.config import suggest
from trainer.config.errors import UserError
from trainer.ensemble.evaluate import EnsembleEvalStep
from trainer.ensemble.step import member_state
from trainer.evaluate.evaluator import Evaluator, Stopped
from trainer.evaluate.host_rows import join_batches
from trainer.evaluate.spec import Evaluation
from trainer.evaluate.step import EvalStep
from trainer.experiment import Experiment
from trainer.input.data import EvalData
from trainer.input.fingerprint import check_evaluated_vocabulary
from trainer.observe.profile import Profile
from trainer.parallel.mesh import batch_shards
from trainer.run.reporter import Reporter
from trainer.step.state import TrainState
from trainer.tasks.measured import MetricValues

Params = Callable[[TrainState], Any]


def make_evaluator(experiment: Experiment, name: str, mesh: Mesh, params: Params) -> Evaluator:
    """Returns the evaluator of one entry of `config.evals`.

    Args:
        experiment: what is evaluated.
        name: name of the entry in `config.evals`.
        mesh: the device mesh.
        params: returns the parameters of a state to evaluate.

    Raises:
        UserError: if the split is empty, or has other tokens than training.
    """
    spec = experiment.evals[name]
    data = spec.data(batch_shards(mesh), None)
    check_evaluated_vocabulary(data, experiment.data, f'config.evals.{name}.data')
    return _evaluator(experiment, spec, data, mesh, params, name=name, has_score=True)


class OtherData:
    """Evaluates and predicts data that the config does not have, as an evaluation of it would.

    One evaluator is kept for each evaluation, so that calls with arrays of the same shapes and
    dtypes (the number of examples aside) compile once.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, params: Params):
        """Reads and compiles nothing yet; arguments as for `make_evaluator`."""
        self._experiment = experiment
        self._mesh = mesh
        self._params = params
        # By the evaluation's name and whether it has a score: the fields of the data, and the
        # evaluator for them.
        self._kept: dict[tuple[str | None, bool], tuple[Any, Evaluator]] = {}

    def evaluate(self, state: TrainState, data: Any, evaluation: str | None) -> MetricValues:
        """Returns the metrics over the data.

        Args:
            state: train state to evaluate.
            data: a dict of arrays (examples, ...), or a source.
            evaluation: the one whose task, transforms and batch size are used; None for the only
                one, or those of training if there is none.

        Raises:
            UserError: for data that cannot be read or has other tokens than training, and if the
            evaluation is not clear.
        """
        return self._evaluator('evaluate(data)', data, evaluation, has_score=True).run(state)

    def predict(
        self, state: TrainState, data: Any, evaluation: str | None
    ) -> dict[str, np.ndarray]:
        """Returns the predictions for all examples of the data, in their order.

        Arguments and errors as for `evaluate`.
        """
        evaluator = self._evaluator('predict(data)', data, evaluation, has_score=False)
        batches = list(evaluator.predict(state))
        if not batches:
            raise UserError('predict(data): there are no examples')
        return join_batches(batches)

    def _evaluator(
        self, path: str, data: Any, evaluation: str | None, *, has_score: bool
    ) -> Evaluator:
        spec = self._choose(evaluation, path)
        source = as_source(data, path)
        loaded = spec.data(batch_shards(self._mesh), source)
        check_evaluated_vocabulary(loaded, self._experiment.data, path)
        key, fields = (evaluation, has_score), None
        if loaded.num_batches:
            fields = dict(loaded.spec), loaded.structure
        if key in self._kept and self._kept[key][0] == fields:
            evaluator = self._kept[key][1]
            evaluator.data = loaded
            return evaluator
        evaluator = _evaluator(
            self._experiment,
            spec,
            loaded,
            self._mesh,
            self._params,
            name=evaluation or 'data',
            path=path,
            has_score=has_score,
        )
        self._kept[key] = fields, evaluator
        return evaluator

    def _choose(self, evaluation: str | None, path: str) -> Evaluation:
        evals = self._experiment.evals
        if evaluation is not None:
            check_name(evals, evaluation, path)
            return evals[evaluation]
        if self._experiment.default_evaluation is not None:
            return self._experiment.default_evaluation
        if len(evals) > 1:
            first = next(iter(evals))
            raise UserError(
                f'{path}: this experiment has several evaluations ({", ".join(evals)}); name the '
                f'one whose task, transforms and batch size to use: evaluation={first!r}'
            )
        return next(iter(evals.values()))


def run_for_row(
    evaluator: Evaluator,
    step: int,
    state: TrainState,
    report: Reporter,
    profile: Profile,
    *,
    should_stop: Callable[[], bool],
) -> bool:
    """Runs an evaluation of a run and opens its row; returns whether it ran to its end.

    Args:
        evaluator: evaluator of an entry of `config.evals`.
        step: number of completed updates.
        state: train state after this step.
        report: gets the row and the time.
        profile: annotates the evaluation.
        should_stop: asked before each batch.
    """
    compiled_before = evaluator.compile_secs
    with report.time.measure('eval'):
        try:
            with profile.annotate_eval(evaluator.name):
                metrics = evaluator.run(state, should_stop=should_stop)
        except Stopped:
            return False
        report.open_eval(evaluator.name, step, metrics)
    # It compiles at its first batch, inside of the time measured above.
    report.time.move('eval', 'compile', evaluator.compile_secs - compiled_before)
    return True


def check_name(evals: Mapping[str, Any], name: str, path: str) -> None:
    """Checks that there is an evaluation of a name.

    Raises:
        UserError: if there is none, naming those that there are.
    """
    if name not in evals:
        nearest = suggest.nearest_name(str(name), evals)
        have = ', '.join(evals) or 'none'
        hint = f'Did you mean {nearest!r}?' if nearest else f'config.evals has: {have}'
        raise UserError(f'{path}: there is no evaluation {name!r}. {hint}')


def bind_model(
    experiment: Experiment, state: TrainState, params: Params, member: int | None
) -> Any:
    """Returns the model with the variables of a state, to call in a notebook.

    Args:
        experiment: what was trained.
        state: train state; for an ensemble, that of all members.
        params: returns the parameters of a state to evaluate.
        member: index of the member, for an ensemble.

    Raises:
        UserError: if the run is an ensemble and no member is given.
    """
    if experiment.ensemble is not None and member is None:
        raise UserError('model: this is an ensemble; choose a member, as in model(member=0)')
    # Before the member is selected: the program takes the state of all of them.
    state = dataclasses.replace(state, params=params(state))
    if experiment.ensemble is not None:
        assert member is not None
        state = member_state(state, member)
    # Imported here because importing Klinen registers it, a cost that other runs need not pay.
    from trainer.klinen.notebook import bind_for_notebook

    return bind_for_notebook(experiment.model, state.variables)


def _evaluator(
    experiment: Experiment,
    spec: Evaluation,
    data: EvalData,
    mesh: Mesh,
    params: Params,
    *,
    name: str,
    has_score: bool,
    path: str | None = None,
) -> Evaluator:
    return Evaluator(
        name,
        _eval_step(experiment, spec, mesh),
        data,
        mesh,
        sharding=experiment.devices.sharding,
        use_ema=spec.ema,
        params=params,
        score=spec.score if has_score else None,
        own_model=spec.model is not None,
        path=path,
    )


def _eval_step(experiment: Experiment, spec: Evaluation, mesh: Mesh) -> EvalStep:
    model = experiment.model if spec.model is None else spec.model
    seed, ensemble = experiment.seed, experiment.ensemble
    if ensemble is None:
        return EvalStep(model=model, task=spec.task, seed=seed)
    return EnsembleEvalStep(
        model=model, task=spec.task, seed=seed, seeds=ensemble.seeds, axis=ensemble.axis(mesh)
    )
