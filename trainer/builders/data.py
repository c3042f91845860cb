# SPDX-License-Identifier: Apache-2.0
"""Builds `config.data` and `config.evals`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from trainer.builders.model import build_model
from trainer.config import targets
from trainer.config.checks import check_positive
from trainer.config.durations import Duration
from trainer.config.errors import UserError
from trainer.config.sections import (
    DataSection,
    EvalDataSection,
    EvalSection,
    ScoreSection,
    Sections,
)
from trainer.evaluate.score import Score, discard
from trainer.evaluate.spec import Evaluation
from trainer.input.collected import CollectLoader, is_collector
from trainer.input.data import EvalData, TrainData
from trainer.tasks.default_prediction import ScoredTask, has_predict
from trainer.tasks.runner import TaskRunner
from trainer.tasks.transformed import KeyedTransform, parameters_of


def build_train_data(sections: Sections) -> TrainData:
    """Returns the data of the training batches.

    Raises:
        UserError: for an invalid argument, or an object that is not a loader.
    """
    data, path = sections.data, 'config.data'
    source = targets.instantiate(data.source, f'{path}.source')
    if is_collector(source):
        return _build_collected(sections, source)
    # One node, so that errors of the source and the transforms name their key paths below it.
    node = {
        **data.loader,
        'source': source,
        'transforms': data.transforms,
        'batch_size': check_positive(data.batch_size, f'{path}.batch_size'),
        'seed': sections.seed if data.seed is None else data.seed,
        'shuffle': data.shuffle,
        'remainder': data.remainder,
        'repeat_batch': data.repeat_batch,
    }
    return TrainData.from_loader(targets.instantiate(node, path), f'{path}.loader')


def _build_collected(sections: Sections, source: Any) -> TrainData:
    """Returns the data of a source that makes its batches with the model.

    Raises:
        UserError: for settings that such data does not have.
    """
    data, path = sections.data, 'config.data'
    name = type(source).__name__
    if data.transforms:
        raise UserError(
            f'{path}.transforms: {name} makes its batches on the devices; use device_transforms'
        )
    if sections.ensemble is not None:
        raise UserError(f'config.ensemble: {name} collects for one model, not for an ensemble')
    if sections.capture:
        raise UserError(f'config.capture: not available for the batches that {name} collects')
    batch_size = check_positive(data.batch_size, f'{path}.batch_size')
    return TrainData.from_loader(CollectLoader(source, batch_size), f'{path}.source')


def build_task(sections: Sections) -> TaskRunner:
    """Returns the task of the training batches."""
    transforms = build_device_transforms(sections.data, 'config.data')
    return TaskRunner.from_task(targets.instantiate(sections.task, 'config.task'), transforms)


def build_evaluations(sections: Sections, task: TaskRunner) -> dict[str, Evaluation]:
    """Returns the evaluations by name; without `task`, they use the training task."""
    return {
        name: _evaluation(name, section, sections, task.task)
        for name, section in sections.evals.items()
    }


def _evaluation(
    name: str, section: EvalSection, sections: Sections, task: Callable[..., Any]
) -> Evaluation:
    """Returns `config.evals.<name>`.

    Raises:
        UserError: for `ema` without `config.ema`, or an invalid argument.
    """
    path = f'config.evals.{name}'
    if section.ema and sections.ema is None:
        raise UserError(f'{path}.ema: this run has no moving average; set config.ema.decay')
    task_path = 'config.task'
    if section.task is not None:
        task_path = f'{path}.task'
        task = targets.instantiate(section.task, task_path)
    if section.score is not None and has_predict(task) and not callable(task):
        task = ScoredTask(task)
    source = targets.instantiate(section.data.source, f'{path}.data.source')
    transforms = targets.instantiate(section.data.transforms, f'{path}.data.transforms')
    batch_size = section.data.batch_size or sections.data.batch_size

    # Later, because the number of examples to pad to depends on the number of devices.
    def build_data(shards: int, other: Any = None) -> EvalData:
        read = source if other is None else other
        node = {
            **section.data.loader,
            'source': read,
            'transforms': transforms,
            'batch_size': batch_size,
            'padded_to': _padded_size(batch_size, read, shards),
        }
        loader = targets.instantiate(node, f'{path}.data')
        return EvalData.from_loader(loader, f'{path}.data.loader')

    return Evaluation(
        every=section.every,
        final=section.final,
        ema=section.ema,
        task=TaskRunner.from_task(
            task, build_device_transforms(section.data, f'{path}.data'), task_path
        ),
        model=build_model(sections, section.model, f'{path}.model') if section.model else None,
        score=None if section.score is None else _build_score(section.score, f'{path}.score'),
        batch_size=check_positive(batch_size, f'{path}.data.batch_size'),
        data=build_data,
    )


def build_default_evaluation(sections: Sections, task: TaskRunner) -> Evaluation | None:
    """Returns how arrays are evaluated in a run without evaluations: as training reads its data.

    None if the config has evaluations.
    """
    if sections.evals:
        return None
    data, path = sections.data, 'config.data'
    batch_size = check_positive(data.batch_size, f'{path}.batch_size')

    def build_data(shards: int, other: Any = None) -> EvalData:
        transforms = targets.instantiate(data.transforms, f'{path}.transforms')
        node = {
            'target': 'trainer.data.loader:EvalLoader',
            'source': other,
            'transforms': transforms,
            'batch_size': batch_size,
            'padded_to': _padded_size(batch_size, other, shards),
        }
        return EvalData.from_loader(targets.instantiate(node, path), path)

    return Evaluation(
        every=Duration.parse('never'),
        final=False,
        ema=False,
        task=task,
        batch_size=batch_size,
        data=build_data,
    )


def as_source(data: Any, path: str) -> Any:
    """Returns a source of arrays; any other source as it is.

    Args:
        data: a dict of arrays (examples, ...), a tuple or another tree of them, or a source.
        path: what messages name.

    Raises:
        UserError: for arrays of different lengths, and for any other object.
    """
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        raise UserError(
            f'{path}: got a list of dicts; expected one dict of arrays, each with one entry per '
            "example, such as {'x': np.stack([example['x'] for example in examples])}"
        )
    # A field may be called 'target', too.
    if isinstance(data, Mapping) and isinstance(data.get('target'), str | type):
        raise UserError(
            f'{path}: got the description of an object, as in a config; create the object (a '
            'source), and pass that'
        )
    if isinstance(data, Mapping | list | tuple):
        make = targets.instantiate({'ref': 'trainer.data.sources:ArraySource'}, path)
        # Not in `instantiate`, which would look for objects to make in the tree.
        try:
            return make(data)
        except (TypeError, ValueError) as error:
            raise UserError(f'{path}: {error}') from error
    if not hasattr(data, 'gather') and not hasattr(data, 'collate'):
        raise UserError(
            f'{path}: expected a dict of arrays, each with one entry per example, or a source (an '
            f'object with __len__, spec and gather, or with collate), got a {type(data).__name__}'
        )
    return data


def _padded_size(batch_size: int, source: Any, shards: int) -> int:
    """Returns the number of examples of a batch with padding: a multiple of the shards."""
    # A source that collates may need places for padding in every batch.
    places = batch_size + getattr(source, 'padding_rows', 0)
    return -(-places // shards) * shards


def _build_score(section: ScoreSection, path: str) -> Score:
    """Returns `config.evals.<name>.score`.

    Raises:
        UserError: if it is neither a function nor an object with `__call__` and `close`.
    """
    make = functools.partial(targets.instantiate, section.node, path)
    # Created once here, so that mistakes are found before training starts.
    score = make()
    discard(score)
    if isinstance(score, type) or not callable(score):
        what = f'the class {score.__name__}' if isinstance(score, type) else repr(score)
        raise UserError(
            f"{path}: expected a function, as ref='package.module:function', or an object that is "
            f"called with each batch and has a method close, as target='package.module:Class'; "
            f'got {what}'
        )
    return Score(make=make, fields=section.fields, path=path)


def build_device_transforms(data: DataSection | EvalDataSection, path: str) -> tuple[Any, ...]:
    """Returns the transforms that run in the compiled step.

    Raises:
        UserError: for one that takes a numpy generator, or is not a function.
    """
    transforms = targets.instantiate(data.device_transforms, f'{path}.device_transforms')
    for index, transform in enumerate(transforms):
        where = f'{path}.device_transforms[{index}]'
        if isinstance(transform, type) or not callable(transform):
            raise UserError(
                f'{where}: expected a function of a batch of JAX arrays, got {transform!r}. '
                f'Transforms of Grain run on the host: move it to {path}.transforms'
            )
        # Inside a compiled step, a numpy generator would draw the same numbers in every step.
        if 'rng' in parameters_of(transform):
            raise UserError(
                f'{where}: {transform!r} draws random numbers from a numpy generator; move it to '
                f'{path}.transforms, or take a JAX key: `key` instead of `rng`'
            )
    return tuple(KeyedTransform.wrap(transform, i) for i, transform in enumerate(transforms))
