# SPDX-License-Identifier: Apache-2.0
"""From `config.data` and `config.evals` to loaders."""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainer.config import targets
from trainer.config.durations import Duration
from trainer.config.errors import UserError
from trainer.config.sections import DataSection, EvalDataSection, EvalSection, Sections
from trainer.tasks.runner import TaskRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One entry of `config.evals`.

    Attributes:
        every: when it runs.
        final: whether it also runs at the end of training.
        ema: whether it evaluates the moving average of the parameters.
        task: what the model is asked to do.
        batch_size: examples in a batch.
        loader: makes the loader, once it is known how many rows divide over the devices.
    """

    every: Duration
    final: bool
    ema: bool
    task: TaskRunner
    batch_size: int
    loader: Callable[..., Any]


def build_train_loader(sections: Sections) -> Any:
    """Returns the loader of the training batches."""
    data, path = sections.data, 'config.data'
    node = {
        **data.loader,
        'source': data.source,
        'transforms': data.transforms,
        'batch_size': positive(data.batch_size, f'{path}.batch_size'),
        'seed': sections.seed if data.seed is None else data.seed,
        'shuffle': data.shuffle,
        'remainder': data.remainder,
        'repeat_batch': data.repeat_batch,
    }
    return targets.instantiate(node, path)


def build_task(sections: Sections) -> TaskRunner:
    """Returns what the model is asked to do with a training batch."""
    transforms = build_device_transforms(sections.data, 'config.data')
    return TaskRunner.of(targets.instantiate(sections.task, 'config.task'), transforms)


def build_evaluations(sections: Sections, task: TaskRunner) -> dict[str, Evaluation]:
    """Returns the evaluations by name; one without a task of its own has the training's."""
    return {
        name: _evaluation(name, section, sections, task.task)
        for name, section in sections.evals.items()
    }


def _evaluation(
    name: str, section: EvalSection, sections: Sections, task: Callable[..., Any]
) -> Evaluation:
    """Returns `config.evals.<name>`.

    Raises:
        UserError: for an average that is not kept, or an argument that does not fit.
    """
    path = f'config.evals.{name}'
    if section.ema and sections.ema is None:
        raise UserError(f'{path}.ema: this run keeps no average; set config.ema.decay')
    if section.task is not None:
        task = targets.instantiate(section.task, f'{path}.task')
    source = targets.instantiate(section.data.source, f'{path}.data.source')
    transforms = targets.instantiate(section.data.transforms, f'{path}.data.transforms')
    batch_size = section.data.batch_size or sections.data.batch_size

    def loader(padded_to: int) -> Any:
        node = {
            **section.data.loader,
            'source': source,
            'transforms': transforms,
            'batch_size': batch_size,
            'padded_to': padded_to,
        }
        return targets.instantiate(node, f'{path}.data')

    return Evaluation(
        every=section.every,
        final=section.final,
        ema=section.ema,
        task=TaskRunner.of(task, build_device_transforms(section.data, f'{path}.data')),
        batch_size=positive(batch_size, f'{path}.data.batch_size'),
        loader=loader,
    )


def fingerprint(loader: Any) -> dict[str, Any]:
    """Returns what tells two sets of data apart: their size, and the first example."""
    if hasattr(loader, 'first'):
        first = loader.first
    else:
        first = {k: x[0] for k, x in loader.block(0, 1, rows=slice(0, 1)).arrays.items()}
    told = {
        name: f'{x.dtype} {x.shape[1:]} {zlib.crc32(_content(x)):08x}' for name, x in first.items()
    }
    return {'examples': loader.examples, 'first example': told}


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two fingerprints."""
    changes = []
    old, new = before['examples'], now['examples']
    if old != new:
        counts = ['a stream' if n is None else f'{n:,} examples' for n in (old, new)]
        changes.append(f'{counts[0]} before, {counts[1]} now')
    first, other = before['first example'], now['first example']
    fields = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if fields:
        changes.append(f'the first example differs in {", ".join(fields)}')
    return changes


def _content(x: np.ndarray) -> bytes:
    # The bytes of an array of objects are addresses, which differ from process to process.
    return repr(x.tolist()).encode() if x.dtype.hasobject else x.tobytes()


def build_device_transforms(data: DataSection | EvalDataSection, path: str) -> tuple[Any, ...]:
    """Returns the transforms that run in the compiled step.

    Raises:
        UserError: for one that asks for numpy's random numbers.
    """
    transforms = targets.instantiate(data.device_transforms, f'{path}.device_transforms')
    for index, transform in enumerate(transforms):
        if 'rng' in inspect.signature(transform).parameters:
            raise UserError(
                f'{path}.device_transforms[{index}]: {transform!r} draws random numbers from '
                f"numpy's generator; it belongs in {path}.transforms"
            )
    return tuple(transforms)


def positive(value: int, path: str) -> int:
    """Returns the value.

    Raises:
        UserError: if it is less than 1.
    """
    if value < 1:
        raise UserError(f'{path}: expected a positive number, got {value}')
    return value
