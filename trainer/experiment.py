# SPDX-License-Identifier: Apache-2.0
"""From a config to real objects, with `trainer.build.data` and `trainer.build.optimizer`.

`build` returns an `Experiment`; after it no code reads a config, and nothing is a name any more.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from trainer.build import captures as probes
from trainer.build import ensemble as members
from trainer.build import monitors
from trainer.build import optimizer as building
from trainer.build.data import device_transforms, evaluation, train_data
from trainer.build.early_stopping import EarlyStopping
from trainer.checkpoint.manager import Retention
from trainer.config import literals, loading, objects, schema, targets
from trainer.config.checks import positive
from trainer.config.durations import Clock, Duration, Progress
from trainer.config.errors import UserError, shown
from trainer.config.loading import LoadedConfig
from trainer.config.sections import PrecisionSection, Sections
from trainer.ensemble.step import Ensemble
from trainer.evaluate.spec import Evaluation
from trainer.input.data import TrainData
from trainer.inspect.capture import Capture
from trainer.modules import Functional, functional
from trainer.modules.foreign import refusal_of_class
from trainer.modules.precision import AS_IS, Precision
from trainer.observe.profile import Window
from trainer.parallel.sharding import BUILT_IN, Rule
from trainer.run.events import Event
from trainer.step.context import StepFunction
from trainer.step.optimizer import Optimizer
from trainer.tasks.runner import TaskRunner
from trainer.weights.init_from import InitFrom
from trainer.weights.surgery import Operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a Trainer needs, and nothing that is still a name.

    Attributes:
        name: the config file's name.
        path: the config file, None if there is none: for files, never read by the run.
        config: the resolved config, plain: for files and messages, never read by the run.
        schedule_steps: steps of each duration inside the optimizer, by config path.
        seed: the run's seed.
        model: the model's functional interface.
        task: what the model is asked to do with a batch.
        data: the training data.
        evals: evaluations by name.
        optimizer: what turns gradients into updates.
        step: what happens in a step.
        accumulate: slices that a batch is cut into.
        ensemble: who the members are, where there are several; or None.
        ema_decay: decay of the parameters' moving average, or None.
        loss_scale: first value of the dynamic loss scale, or None.
        steps_per_call: updates made by one call of the compiled step.
        early_stopping: what ends the run before its time, or None.
        mesh: axis name to size.
        sharding: rules that cut parameters over the mesh, in order of precedence.
        total_steps: number of updates of the run.
        clock: turns durations into steps.
        log_every: period of the metric rows.
        tensorboard: whether event files are written too.
        profile: the steps that are traced, or None.
        captures: what is captured of the model's insides, by name.
        guard: 'stop' or 'warn' where something is not finite.
        save_every: period of the checkpoints.
        retention: which checkpoints are kept.
        prefetch: blocks of batches kept ready.
        init_from: where the weights of a fresh run come from, or None.
        surgery: what is done to them before they must fit the model.
        hooks: called with each `Event`, by name.
        timed: returns the fields that depend on how many examples a loader's steps consume.
    """

    name: str
    path: pathlib.Path | None = None
    config: Mapping[str, Any]
    schedule_steps: Mapping[str, int]
    seed: int
    model: Functional
    task: TaskRunner
    data: TrainData
    evals: Mapping[str, Evaluation]
    optimizer: Optimizer
    step: StepFunction
    accumulate: int
    ensemble: Ensemble | None
    ema_decay: float | None
    loss_scale: float | None
    steps_per_call: int
    early_stopping: EarlyStopping | None
    mesh: Mapping[str, int]
    sharding: tuple[Rule, ...]
    total_steps: int
    clock: Clock
    log_every: Duration
    tensorboard: bool
    profile: Window | None
    captures: Mapping[str, Capture]
    guard: str
    save_every: Duration
    retention: Retention
    prefetch: int
    init_from: InitFrom | None
    surgery: tuple[Operation, ...]
    hooks: Mapping[str, Callable[[Event], None]]
    timed: Callable[[TrainData], Mapping[str, Any]] = dataclasses.field(repr=False)

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
        data = self.data.after(batch_sizes)
        return dataclasses.replace(self, data=data, **self.timed(data))


def build(loaded: LoadedConfig) -> Experiment:
    """Imports every target, checks every argument, and makes the objects. No device is touched.

    Raises:
        UserError: for a key that nothing reads, a name that does not exist, an argument that does
            not fit.
    """
    config = loading.plain(loaded.config)
    literals.check(config, 'config', [])
    sections = schema.read(config)
    _check_model(sections.model)
    _check_targets(sections)

    data = train_data(sections)
    transforms = device_transforms(sections.data, 'config.data')
    task = TaskRunner.of(targets.instantiate(sections.task, 'config.task'), transforms)
    accumulate = _accumulate(sections, task)
    timed = functools.partial(_timed, sections)
    checkpoint, log = sections.checkpoint, sections.log
    return Experiment(
        name=loaded.name,
        path=loaded.path,
        config=config,
        seed=sections.seed,
        model=_model(sections),
        task=task,
        data=data,
        evals={
            name: evaluation(name, section, sections, task.task)
            for name, section in sections.evals.items()
        },
        step=building.step_function(sections.step),
        accumulate=accumulate,
        ema_decay=_ema_decay(sections),
        loss_scale=_loss_scale(sections.precision),
        steps_per_call=positive(sections.steps_per_call, 'config.steps_per_call'),
        early_stopping=monitors.early_stopping(sections),
        mesh=sections.mesh,
        sharding=_sharding(sections),
        log_every=log.every,
        tensorboard=log.tensorboard,
        guard=sections.guard.non_finite,
        save_every=checkpoint.every,
        prefetch=positive(sections.data.prefetch, 'config.data.prefetch'),
        init_from=InitFrom.of(sections.init_from),
        surgery=tuple(
            targets.instantiate(node, f'config.surgery[{index}]')
            for index, node in enumerate(sections.surgery)
        ),
        hooks={
            name: targets.instantiate(node, f'config.hooks.{name}')
            for name, node in sections.hooks.items()
        },
        timed=timed,
        **timed(data),
    )


def _timed(sections: Sections, data: TrainData) -> dict[str, Any]:
    """Returns the fields of an experiment that depend on how many examples its steps consume."""
    clock = _clock(sections, data)
    optimizer, schedule_steps = building.optimizer(sections.optimizer, clock)
    return {
        'clock': clock,
        'total_steps': clock.total_steps,
        'optimizer': optimizer,
        'schedule_steps': schedule_steps,
        'ensemble': members.ensemble(sections, clock),
        'profile': _profile(sections, clock),
        'captures': probes.captures(sections, clock),
        'retention': monitors.retention(sections, clock),
    }


def load_and_build(spec: str, **overrides: Any) -> Experiment:
    """Returns the experiment of a config file, for notebooks.

    Args:
        spec: 'configs/mnist.py' or 'configs/mnist.py:arg'.
        **overrides: values by path, with '__' for '.': `optimizer__learning_rate=0.1`.
    """
    from trainer.config import overrides as override_lib

    loaded = loading.load(spec)
    assignments = [
        (path.replace('__', '.'), override_lib.from_python(value, path.replace('__', '.')))
        for path, value in overrides.items()
    ]
    override_lib.apply(loaded.config, assignments)
    return build(loaded)


def _check_targets(sections: Sections) -> None:
    """Checks every name before any object is made, so that a typo costs no data loading."""
    for field in dataclasses.fields(sections):
        if field.name not in ('vars', 'optimizer', 'step', 'ensemble'):
            _check_below(getattr(sections, field.name), f'config.{field.name}')
    building.check_optimizer(sections.optimizer)
    building.check_step(sections.step)


def _check_model(node: Any) -> None:
    """Refuses a model of another library, and a function of inputs, by what they are."""
    if not isinstance(node, Mapping) or 'target' not in node:
        return
    target = objects.resolve(node['target'], 'config.model.target')
    if (reason := refusal_of_class(target)) is not None:
        raise UserError(reason)
    try:
        targets.check(node, 'config.model')
    except UserError as error:
        if inspect.isroutine(target) and ' is missing: ' in str(error):
            raise UserError(
                f'{error}. A function that is the target of config.model makes the model: it is '
                'called once, with the other keys of config.model, and not with inputs'
            ) from error
        raise


def _check_below(value: Any, path: str) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        for field in dataclasses.fields(value):
            _check_below(getattr(value, field.name), f'{path}.{field.name}')
    elif isinstance(value, dict) and 'target' not in value and 'ref' not in value:
        for name, item in value.items():
            _check_below(item, f'{path}.{name}')
    elif path.endswith('.loader'):
        if 'target' not in value:
            raise UserError(
                f"{path}: expected a dict with 'target', a class like data.loader:TrainLoader that "
                f'is given the source; got {shown(value)}'
            )
        objects.resolve(value['target'], f'{path}.target')
    else:
        targets.check(value, path)


def _model(sections: Sections) -> Functional:
    path = 'config.model'
    if isinstance(sections.model.get('rngs'), int):
        raise UserError(f'{path}.rngs: leave it out; random numbers come from config.seed')
    if targets.takes(sections.model, 'rngs', path):  # NNX makes its parameters with the module.
        module: Any = functools.partial(_with_rngs, sections.model, path)
    else:
        module = targets.instantiate(sections.model, path)
    wanted = sections.precision
    precision = AS_IS
    if wanted is not None:
        precision = Precision(params=wanted.params, compute=wanted.compute, output=wanted.output)
    try:
        return functional(module, precision, named=sections.profile is not None)
    except TypeError as error:
        raise UserError(str(error)) from error


def _with_rngs(node: Any, path: str, rngs: Any) -> Any:
    return targets.instantiate(node, path, {'rngs': rngs})


def _accumulate(sections: Sections, task: TaskRunner) -> int:
    slices = positive(sections.accumulate, 'config.accumulate')
    if slices > 1 and not getattr(task.task, 'decomposable', True):
        raise UserError(
            f'config.accumulate: {slices} slices of a batch are not the batch: the examples of '
            f'{type(task.task).__name__} depend on each other (decomposable = False)'
        )
    return slices


def _ema_decay(sections: Sections) -> float | None:
    decay = sections.ema.decay if sections.ema else None
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f'config.ema.decay: expected a number from 0 to below 1, got {decay}')
    return decay


def _loss_scale(precision: PrecisionSection | None) -> float | None:
    if precision is None:
        return None
    if precision.loss_scale is None:
        return 2.0**16 if 'float16' in (precision.params, precision.compute) else None
    return precision.loss_scale or None


def _sharding(sections: Sections) -> tuple[Rule, ...]:
    given, path = sections.sharding, 'config.sharding'
    if not isinstance(given, tuple):
        return (_rule(given, path),)
    return tuple(_rule(rule, f'{path}[{index}]') for index, rule in enumerate(given))


def _rule(given: Any, path: str) -> Rule:
    return BUILT_IN[given] if isinstance(given, str) else targets.instantiate(given, path)


def _clock(sections: Sections, data: TrainData) -> Clock:
    clock = Clock(
        batch_size=sections.data.batch_size,
        steps_per_epoch=data.steps_per_epoch,
        progress=Progress(data.marks) if data.marks else None,
    )
    total = clock.step_after(sections.train_for, path='config.train_for')
    if total >= 2**31:
        raise UserError(f'config.train_for: {total:.3g} steps; the state counts to 2^31 - 1')
    return dataclasses.replace(clock, total_steps=total)


def _profile(sections: Sections, clock: Clock) -> Window | None:
    given = sections.profile
    if given is None:
        return None
    start = clock.step_after(given.start, path='config.profile.start')
    return Window(start, start + positive(given.steps, 'config.profile.steps'))
