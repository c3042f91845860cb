# SPDX-License-Identifier: Apache-2.0
"""Builds the source of the initial weights: `config.init_from` and `config.surgery`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import targets
from trainer.config.errors import UserError, short_repr
from trainer.config.sections import Sections
from trainer.weights.init_from import WHERE, InitFrom
from trainer.weights.surgery import Operation


def build_init_from(sections: Sections) -> InitFrom | None:
    """Returns the checkpoint to load into a fresh run, or None.

    Raises:
        UserError: for an invalid pattern, and for keys that exclude each other.
    """
    section = sections.init_from
    if section is None:
        return None
    given = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    # The section allows a single pattern, `InitFrom` has tuples only.
    for name in ('include', 'exclude'):
        patterns = given[name]
        given[name] = (patterns,) if isinstance(patterns, str) else patterns or ()
    given['rename'] = tuple(
        pair for index, entry in enumerate(section.rename) for pair in _pairs(entry, index)
    )
    return InitFrom(**given)


def build_surgery(sections: Sections) -> tuple[Operation, ...]:
    """Returns the operations on the initial weights, in order."""
    return tuple(
        targets.instantiate(node, f'config.surgery[{index}]')
        for index, node in enumerate(sections.surgery)
    )


def _pairs(entry: Any, index: int) -> Sequence[tuple[str, str]]:
    """Returns the (pattern, replacement) pairs of an entry: a pair, or an object that is a list."""
    if not isinstance(entry, Mapping):
        return [entry]
    path = f'{WHERE}.rename[{index}]'
    pairs = targets.instantiate(entry, path)
    is_list = isinstance(pairs, (tuple, list))
    if not is_list or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise UserError(f'{path}: expected (pattern, replacement) pairs, got {short_repr(pairs)}')
    return pairs
