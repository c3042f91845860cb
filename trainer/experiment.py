# SPDX-License-Identifier: Apache-2.0
"""From a config to an `Experiment`: real objects, and nothing that is still a name.

`build` is a table of calls into `trainer.builders`, one for each section of the config. After it no
code reads a config.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from trainer.builders.captures import Capture, build_captures
from trainer.builders.data import build_evaluations, build_task, build_train_data
from trainer.builders.early_stopping import EarlyStopping
from trainer.builders.ensemble import build_ensemble
from trainer.builders.model import build_loss_scale, build_model
from trainer.builders.monitors import build_early_stopping, build_retention
from trainer.builders.names import check_names
from trainer.builders.optimizer import build_optimizer, build_step
from trainer.builders.training import (
    build_accumulate,
    build_clock,
    build_ema_decay,
    build_hooks,
    build_profile,
    build_sharding,
)
from trainer.builders.weights import build_init_from, build_surgery
from trainer.checkpoint.retention import Retention
from trainer.config import literals, loading, overrides, schema
from trainer.config.checks import positive
from trainer.config.durations import Clock, Duration
from trainer.config.loading import LoadedConfig
from trainer.config.sections import Sections
from trainer.ensemble.step import Ensemble
from trainer.evaluate.spec import Evaluation
from trainer.hooks import Event
from trainer.input.data import TrainData
from trainer.modules.functional import Functional
from trainer.observe.profile import Window
from trainer.parallel.sharding import Rule
from trainer.step.context import StepFunction
from trainer.step.optimizer import Optimizer
from trainer.tasks.runner import TaskRunner
from trainer.weights.init_from import InitFrom
from trainer.weights.surgery import Operation


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an experiment comes from: for files and messages, never read by the run.

    Attributes:
        name: the config file's name.
        path: the config file, None if there is none.
        config: the resolved config, plain.
        schedule_steps: steps of each duration inside the optimizer, by config path.
    """

    name: str
    path: pathlib.Path | None
    config: Mapping[str, Any]
    schedule_steps: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a run trains.

    Attributes:
        total_steps: number of updates of the run.
        accumulate: slices that a batch is cut into.
        ema_decay: decay of the parameters' moving average, or None.
        loss_scale: first value of the dynamic loss scale, or None.
        steps_per_call: updates made by one call of the compiled step.
        guard: 'stop' or 'warn' where a value is not finite.
        early_stopping: what ends the run early, or None.
    """

    total_steps: int
    accumulate: int
    ema_decay: float | None
    loss_scale: float | None
    steps_per_call: int
    guard: str
    early_stopping: EarlyStopping | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a run computes.

    Attributes:
        mesh: axis name to size.
        sharding: rules that shard parameters over the mesh, in order of precedence.
    """

    mesh: Mapping[str, int]
    sharding: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """What a run records.

    Attributes:
        every: period of the metric rows.
        tensorboard: whether event files are written too.
        profile: the steps that are traced, or None.
        captures: what is captured inside the model, by name.
    """

    every: Duration
    tensorboard: bool
    profile: Window | None
    captures: Mapping[str, Capture]


@dataclasses.dataclass(frozen=True)
class Saving:
    """When checkpoints are saved, and which of them are kept."""

    every: Duration
    retention: Retention


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartFrom:
    """What a fresh run starts from.

    Attributes:
        weights: where its first weights come from, or None.
        surgery: what is done to them before they must fit the model.
    """

    weights: InitFrom | None
    surgery: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """What depends on how many examples the steps of a training loader consume.

    Its attributes are those of `Experiment` and of its groups.
    """

    clock: Clock
    total_steps: int
    optimizer: Optimizer
    schedule_steps: Mapping[str, int]
    ensemble: Ensemble | None
    profile: Window | None
    captures: Mapping[str, Capture]
    retention: Retention

    @classmethod
    def of(cls, sections: Sections, data: TrainData) -> Timed:
        """Builds it from the sections of a config, for a training loader."""
        clock, total_steps = build_clock(sections, data)
        optimizer, schedule_steps = build_optimizer(
            sections.optimizer, clock, logged=sections.log.learning_rates
        )
        return cls(
            clock=clock,
            total_steps=total_steps,
            optimizer=optimizer,
            schedule_steps=schedule_steps,
            ensemble=build_ensemble(sections, clock),
            profile=build_profile(sections, clock),
            captures=build_captures(sections, clock),
            retention=build_retention(sections, clock),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a Trainer needs.

    Attributes:
        origin: the config that it was built from.
        seed: the run's seed.
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        data: the training data.
        prefetch: blocks of batches that are kept ready on the devices.
        evals: evaluations by name.
        clock: turns durations into steps.
        optimizer: what turns gradients into updates.
        ensemble: who the members are, if there are several; or None.
        step: what happens in a step.
        training: how long and how it trains.
        devices: where it computes.
        logging: what it records.
        saving: its checkpoints.
        start: what a fresh run starts from.
        hooks: called with each `Event`, by name.
        timed: returns what depends on how many examples the steps of a loader consume.
    """

    origin: Origin
    seed: int
    model: Functional
    task: TaskRunner
    data: TrainData
    prefetch: int
    evals: Mapping[str, Evaluation]
    clock: Clock
    optimizer: Optimizer
    ensemble: Ensemble | None
    step: StepFunction
    training: Training
    devices: Devices
    logging: Logging
    saving: Saving
    start: StartFrom
    hooks: Mapping[str, Callable[[Event], None]]
    timed: Callable[[TrainData], Timed] = dataclasses.field(repr=False)

    def after(self, batch_sizes: tuple[tuple[int, int], ...]) -> Experiment:
        """Returns the experiment of a run whose batch size has changed.

        Its data continues after the batches consumed so far; everything that is not given in steps
        counts examples.

        Args:
            batch_sizes: (first step, batch size) of each part of the run, this experiment's last.

        Raises:
            UserError: if the loader cannot resume, or a schedule cannot be adjusted.
        """
        if len(batch_sizes) == 1 and not self.data.marks:
            return self
        data = self.data.with_batch_sizes(batch_sizes)
        new = self.timed(data)
        logging = dataclasses.replace(self.logging, profile=new.profile, captures=new.captures)
        return dataclasses.replace(
            self,
            data=data,
            clock=new.clock,
            optimizer=new.optimizer,
            ensemble=new.ensemble,
            origin=dataclasses.replace(self.origin, schedule_steps=new.schedule_steps),
            training=dataclasses.replace(self.training, total_steps=new.total_steps),
            logging=logging,
            saving=dataclasses.replace(self.saving, retention=new.retention),
        )


def build(loaded: LoadedConfig) -> Experiment:
    """Imports every target, checks every argument, and makes the objects. No device is touched.

    Raises:
        UserError: for a key that nothing reads, a name that does not exist, an argument that does
            not fit.
    """
    config = loading.plain(loaded.config)
    literals.check(config, 'config', [])
    sections = schema.read(config)
    check_names(sections)
    data, task = build_train_data(sections), build_task(sections)
    # Mistakes of the config alone come before what the user's own code does.
    training: dict[str, Any] = {
        'accumulate': build_accumulate(sections, task),
        'ema_decay': build_ema_decay(sections),
        'loss_scale': build_loss_scale(sections.precision),
        'steps_per_call': positive(sections.steps_per_call, 'config.steps_per_call'),
        'guard': sections.guard.non_finite,
        'early_stopping': build_early_stopping(sections),
    }
    prefetch = positive(sections.data.prefetch, 'config.data.prefetch')
    model, evals = build_model(sections), build_evaluations(sections, task)
    step, sharding = build_step(sections.step), build_sharding(sections)
    start = StartFrom(weights=build_init_from(sections), surgery=build_surgery(sections))
    hooks = build_hooks(sections)
    timed = Timed.of(sections, data)
    return Experiment(
        origin=Origin(loaded.name, loaded.path, config, timed.schedule_steps),
        seed=sections.seed,
        model=model,
        task=task,
        data=data,
        prefetch=prefetch,
        evals=evals,
        clock=timed.clock,
        optimizer=timed.optimizer,
        ensemble=timed.ensemble,
        step=step,
        training=Training(total_steps=timed.total_steps, **training),
        devices=Devices(mesh=sections.mesh, sharding=sharding),
        logging=Logging(
            every=sections.log.every,
            tensorboard=sections.log.tensorboard,
            profile=timed.profile,
            captures=timed.captures,
        ),
        saving=Saving(sections.checkpoint.every, timed.retention),
        start=start,
        hooks=hooks,
        timed=functools.partial(Timed.of, sections),
    )


def load_and_build(spec: str, **values: Any) -> Experiment:
    """Returns the experiment of a config file, for notebooks.

    Args:
        spec: 'configs/mnist.py' or 'configs/mnist.py:arg'.
        **values: overrides by path, with '__' for '.': `optimizer__learning_rate=0.1`.
    """
    loaded = loading.load(spec)
    paths = {path: path.replace('__', '.') for path in values}
    assignments = [
        (paths[name], overrides.from_python(value, paths[name])) for name, value in values.items()
    ]
    overrides.apply(loaded.config, assignments)
    return build(loaded)
