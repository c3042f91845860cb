# SPDX-License-Identifier: Apache-2.0
"""`build`: turns a config into an `Experiment`, in which every name is resolved to an object.

It calls one builder of `trainer.builders` for each section of the config. No code after it reads a
config.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_collections

from trainer.builders.captures import Capture, build_captures
from trainer.builders.data import (
    build_default_evaluation,
    build_evaluations,
    build_task,
    build_train_data,
)
from trainer.builders.early_stopping import EarlyStopping
from trainer.builders.ensemble import build_ensemble
from trainer.builders.hooks import HookRules, build_hook_rules, build_hooks
from trainer.builders.model import build_loss_scale, build_model
from trainer.builders.monitors import build_early_stopping, build_retention
from trainer.builders.names import check_names
from trainer.builders.optimizer import build_optimizer, build_step
from trainer.builders.training import (
    build_accumulate,
    build_clock,
    build_ema_decay,
    build_profile,
    build_sharding,
    build_watchdog,
)
from trainer.builders.weights import build_init_from, build_surgery
from trainer.checkpoint.retention import Retention
from trainer.config import literals, loading, overrides, python_objects, schema
from trainer.config.checks import check_positive
from trainer.config.columns import align_columns
from trainer.config.durations import Clock, Duration
from trainer.config.loading import LoadedConfig
from trainer.config.sections import Sections, WatchdogSection
from trainer.ensemble.step import Ensemble
from trainer.evaluate.spec import Evaluation
from trainer.hooks import Event
from trainer.input.data import TrainData
from trainer.modules.functional import Functional
from trainer.observe.profile import Window
from trainer.parallel import virtual_devices
from trainer.parallel.sharding import Rule
from trainer.step.context import StepFunction
from trainer.step.optimizer import Optimizer
from trainer.tasks.runner import TaskRunner
from trainer.weights.init_from import InitFrom
from trainer.weights.surgery import Operation


@dataclasses.dataclass(frozen=True)
class Origin:
    """The config that an experiment was built from: for files and messages only.

    Attributes:
        name: name of the config file.
        path: path of the config file, or None if the config came from Python.
        config: the resolved config as plain Python, read-only.
        schedule_steps: steps of each duration inside the optimizer, by config path.
        objects: config paths of objects that only the program that built it has.
    """

    name: str
    path: pathlib.Path | None
    config: Mapping[str, Any]
    schedule_steps: Mapping[str, int]
    objects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the training loop and the train step.

    Attributes:
        total_steps: number of steps of the run.
        accumulate: number of micro-batches per batch.
        ema_decay: decay of the moving average of the parameters, or None.
        loss_scale: initial value of the dynamic loss scale, or None.
        steps_per_call: steps made by one call of the compiled program.
        guard: reaction to values that are not finite: 'stop' or 'warn'.
        early_stopping: the rule that ends the run early, or None.
        watchdog: limits in seconds for a run that hangs.
    """

    total_steps: int
    accumulate: int
    ema_decay: float | None
    loss_scale: float | None
    steps_per_call: int
    guard: str
    early_stopping: EarlyStopping | None
    watchdog: WatchdogSection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The device mesh and the sharding of parameters.

    Attributes:
        mesh: axis name to size.
        sharding: rules that shard parameters over the mesh, in order of precedence.
    """

    mesh: Mapping[str, int]
    sharding: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """The output of a run.

    Attributes:
        every: period of the metric rows.
        tensorboard: whether event files are written too.
        profile: the steps to profile, or None.
        captures: captures of intermediate values, by name.
    """

    every: Duration
    tensorboard: bool
    profile: Window | None
    captures: Mapping[str, Capture]


@dataclasses.dataclass(frozen=True)
class Saving:
    """The period of checkpoints, and which of them are kept."""

    every: Duration
    retention: Retention


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartFrom:
    """The initial weights of a fresh run.

    Attributes:
        weights: source of the initial weights, or None.
        surgery: operations on them, applied before they are matched with the model.
    """

    weights: InitFrom | None
    surgery: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockParts:
    """The objects that depend on the number of examples per step and per epoch.

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
    def from_sections(cls, sections: Sections, data: TrainData) -> ClockParts:
        """Builds these objects from the sections of a config, for a training loader."""
        # The clock comes first: it converts the durations of everything below to steps, which takes
        # the size of the training data.
        clock, total_steps = build_clock(sections, data)
        optimizer, schedule_steps = build_optimizer(
            sections.optimizer, clock, logged=sections.log.learning_rates
        )
        return cls(
            clock=clock,
            total_steps=total_steps,
            optimizer=optimizer,
            schedule_steps=MappingProxyType(schedule_steps),
            ensemble=build_ensemble(sections, clock),
            profile=build_profile(sections, clock),
            captures=MappingProxyType(build_captures(sections, clock)),
            retention=build_retention(sections, clock),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a Trainer needs.

    Attributes:
        origin: the config that it was built from.
        seed: seed of the run.
        model: functional interface of the model.
        task: computes loss, metrics and predictions of a batch.
        data: loader of the training data, and what is known of it.
        prefetch: number of blocks of batches kept ready on the devices.
        evals: evaluations by name.
        default_evaluation: how arrays are evaluated if there are no evaluations; else None.
        clock: converts durations to steps.
        optimizer: computes updates from gradients.
        ensemble: the members of an ensemble, or None.
        step: the function of a train step.
        training: settings of the training loop and the train step.
        devices: mesh and sharding.
        logging: output of the run.
        saving: when to save checkpoints, and which to keep.
        start: initial weights of a fresh run.
        hooks: functions called with each `Event`, by name.
        hook_rules: when hooks are called, by name; those without rules have the defaults.
        build_clock_parts: builds, for a loader, the objects that depend on the number of examples
            per step.
    """

    origin: Origin
    seed: int
    model: Functional
    task: TaskRunner
    data: TrainData
    prefetch: int
    evals: Mapping[str, Evaluation]
    default_evaluation: Evaluation | None
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
    hook_rules: Mapping[str, HookRules]
    build_clock_parts: Callable[[TrainData], ClockParts] = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        """Returns what is trained, a line for each part, without its objects."""
        config = self.origin.config
        lines = [f'Experiment({self.origin.path or "a ConfigDict"})']
        rows = []
        for name in ('model', 'task', 'data', 'optimizer'):
            node = config.get(name) or {}
            node = node.get('source', node) if name == 'data' else node
            rows.append((name, str(node.get('target', node.get('ref', 'see config')))))
        sizes = f'{self.training.total_steps:,} steps of {self.clock.batch_size:,} examples'
        rows += [('training', sizes), ('evals', ', '.join(self.evals) or 'none')]
        return '\n'.join([*lines, *(f'  {line}' for line in align_columns(rows))])

    def with_batch_sizes(self, batch_sizes: tuple[tuple[int, int], ...]) -> Experiment:
        """Returns the experiment of a run that resumes with a different batch size.

        Its data continues after the batches consumed so far. Durations that are not in steps count
        examples.

        Args:
            batch_sizes: (first step, batch size) of each part of the run; the last part is that of
                this experiment.

        Raises:
            UserError: if the loader cannot resume, or a schedule cannot be adjusted.
        """
        # The data has marks if this experiment already has a history of batch sizes. A history of a
        # single size has to undo them.
        if len(batch_sizes) == 1 and not self.data.marks:
            return self
        # The data first: the clock reads the marks of the new loader.
        data = self.data.with_batch_sizes(batch_sizes)
        parts = self.build_clock_parts(data)
        logging = dataclasses.replace(self.logging, profile=parts.profile, captures=parts.captures)
        return dataclasses.replace(
            self,
            data=data,
            clock=parts.clock,
            optimizer=parts.optimizer,
            ensemble=parts.ensemble,
            origin=dataclasses.replace(self.origin, schedule_steps=parts.schedule_steps),
            training=dataclasses.replace(self.training, total_steps=parts.total_steps),
            logging=logging,
            saving=dataclasses.replace(self.saving, retention=parts.retention),
        )


def build(config: ml_collections.ConfigDict | LoadedConfig) -> Experiment:
    """Imports every target, checks every argument and creates the objects, without using a device.

    Args:
        config: the config, which is not changed; a `LoadedConfig` if it comes from a file.

    Raises:
        UserError: for an unknown key, a name that does not exist, or an invalid argument.
    """
    # Here, because scripts build an experiment before they use a device.
    virtual_devices.add_threads()
    loaded = config if isinstance(config, LoadedConfig) else loading.from_python(config)
    return _build(loaded)


def _build(loaded: LoadedConfig) -> Experiment:
    config = python_objects.name_objects(loading.to_plain(loaded.config))
    # First: the sections and the builders handle only values that a config can hold.
    literals.check(config, 'config', [])
    sections = schema.read(config)
    # Imports every target: a misspelled one is reported before the data is opened, which may be
    # slow.
    check_names(sections)
    data, task = build_train_data(sections), build_task(sections)
    # Values that the config alone determines come before calls of the user's code, so that a typo
    # is reported without waiting for, say, a model to be created.
    training = _build_training(sections, task)
    prefetch = check_positive(sections.data.prefetch, 'config.data.prefetch')
    # The user's code runs from here on.
    model, evals = build_model(sections), build_evaluations(sections, task)
    step, sharding = build_step(sections.step), build_sharding(sections)
    start = StartFrom(weights=build_init_from(sections), surgery=build_surgery(sections))
    hooks = build_hooks(sections)
    parts = ClockParts.from_sections(sections, data)
    return Experiment(
        origin=Origin(
            name=loaded.name,
            path=loaded.path,
            config=python_objects.without_objects(config),
            schedule_steps=parts.schedule_steps,
            objects=tuple(python_objects.find_objects(config)),
        ),
        seed=sections.seed,
        model=model,
        task=task,
        data=data,
        prefetch=prefetch,
        evals=MappingProxyType(evals),
        default_evaluation=build_default_evaluation(sections, task),
        clock=parts.clock,
        optimizer=parts.optimizer,
        ensemble=parts.ensemble,
        step=step,
        training=Training(total_steps=parts.total_steps, **training),
        devices=Devices(mesh=MappingProxyType(dict(sections.mesh)), sharding=sharding),
        logging=Logging(
            every=sections.log.every,
            tensorboard=sections.log.tensorboard,
            profile=parts.profile,
            captures=parts.captures,
        ),
        saving=Saving(sections.checkpoint.every, parts.retention),
        start=start,
        hooks=MappingProxyType(hooks),
        hook_rules=MappingProxyType(build_hook_rules(sections)),
        # A function and not the sections themselves: no code after `build` reads a config.
        build_clock_parts=functools.partial(ClockParts.from_sections, sections),
    )


def _build_training(sections: Sections, task: TaskRunner) -> dict[str, Any]:
    """Returns the arguments of `Training`, except for `total_steps`."""
    return {
        'accumulate': build_accumulate(sections, task),
        'ema_decay': build_ema_decay(sections),
        'loss_scale': build_loss_scale(sections.precision),
        'steps_per_call': check_positive(sections.steps_per_call, 'config.steps_per_call'),
        'guard': sections.guard.non_finite,
        'early_stopping': build_early_stopping(sections),
        'watchdog': build_watchdog(sections.watchdog),
    }


def load_and_build(
    config: str | os.PathLike[str] | ml_collections.ConfigDict, /, **values: Any
) -> Experiment:
    """Loads a config, applies overrides and builds its experiment; for notebooks.

    Args:
        config: 'configs/mnist.py', 'configs/mnist.py:arg', or an `ml_collections.ConfigDict`,
            which is not changed.
        **values: overrides by key path, with '__' instead of '.': `optimizer__learning_rate=0.1`.

    Raises:
        UserError: for a config that cannot be loaded, and as `build`.
    """
    if isinstance(config, (str, os.PathLike)):
        loaded = loading.load(os.fspath(config))
    else:
        loaded = loading.from_python(config)
    # Keyword arguments cannot contain dots.
    paths = {path: path.replace('__', '.') for path in values}
    assignments = [
        (paths[name], overrides.from_python(value, paths[name])) for name, value in values.items()
    ]
    # The same checks as on the command line, with the same messages.
    overrides.apply(loaded.config, assignments)
    return _build(loaded)
