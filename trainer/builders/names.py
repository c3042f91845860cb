# SPDX-License-Identifier: Apache-2.0
"""Checks every name in a config before any object is created, so that typos are found at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from trainer.builders.model import check_model, merge_arguments
from trainer.builders.optimizer import check_optimizer, check_step
from trainer.config import objects, targets
from trainer.config.durations import Duration
from trainer.config.errors import UserError, short_repr
from trainer.config.sections import Sections

# Sections with a check of their own, or without targets.
_OTHERS = ('vars', 'optimizer', 'step', 'ensemble')


def check_names(sections: Sections) -> None:
    """Checks that every target exists and takes its arguments; nothing is called.

    Raises:
        UserError: for a name that does not exist, or an invalid argument.
    """
    check_model(sections.model)
    for name, section in sections.evals.items():
        if section.model:
            node = merge_arguments(sections.model, section.model)
            check_model(node, f'config.evals.{name}.model')
    for field in dataclasses.fields(sections):
        if field.name not in _OTHERS:
            _check_targets(getattr(sections, field.name), f'config.{field.name}')
    check_optimizer(sections.optimizer)
    check_step(sections.step)


def _check_targets(value: Any, path: str) -> None:
    """Checks all targets in a value of a section."""
    # A Duration is a dataclass, but a plain value of a config.
    if dataclasses.is_dataclass(value) and not isinstance(value, Duration):
        for field in dataclasses.fields(value):
            # The keys of a section that are not its own are those of an object in its place.
            place = path if field.metadata.get('rest') else f'{path}.{field.name}'
            _check_targets(getattr(value, field.name), place)
    elif isinstance(value, dict) and 'target' not in value and 'ref' not in value:
        for name, item in value.items():
            _check_targets(item, f'{path}.{name}')
    # Its arguments are checked when it is built: most of them come from other keys of `data`.
    elif path.endswith('.loader'):
        if 'target' not in value:
            raise UserError(
                f"{path}: expected a dict with 'target', a class such as "
                f'trainer.data.loader:TrainLoader that takes the source; got {short_repr(value)}'
            )
        objects.resolve(value['target'], f'{path}.target')
    else:
        targets.check(value, path)
