# SPDX-License-Identifier: Apache-2.0
"""Which parameters decay: `config.optimizer.decay_mask` as the argument that an optimizer has."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.build import learning_rate
from trainer.config import paths
from trainer.config.errors import UserError
from trainer.config.sections import Node
from trainer.step.optimizer import RegexMask

_log = logging.getLogger('trainer')

# What optimizers call the mask of their weight decay, and the decay itself.
_MASKS = ('weight_decay_mask', 'mask')
_DECAYS = ('weight_decay', 'weight_decay_rate')

# Whose `mask` is of something else.
_OTHERS = (':masked', ':freeze')

# Of optax.contrib:muon: a decay that its mask does not reach.
_UNMASKED = 'adam_weight_decay'


def masked(node: Node, path: str, mask: RegexMask) -> Node:
    """Returns an optimizer's node with a mask for the weight decay of every target below it.

    Args:
        node: names the optimizer.
        path: of the node, for messages.
        mask: which parameters decay.

    Raises:
        UserError: if nothing below it takes such a mask, or it is given one already.
    """
    found = list(_maskable(node, [], path))
    if not found:
        raise UserError(_refusal(node, path))
    for keys, name in found:
        at = f'{path}.{paths.join(keys)}'.rstrip('.')
        mine = paths.get(node, keys)
        known, names = learning_rate.parameters(mine, path)
        given = {each: paths.get(mine, list(place)) for place, each in names.items()}
        if name in given:
            raise UserError(
                f'{path}.decay_mask and {at}.{name} both say what decays. Leave one of them out'
            )
        if given.get(_UNMASKED):
            raise UserError(
                f'{at}.{_UNMASKED}: {mine["target"]} masks the weight decay of its matrices only, '
                f'and this one would decay all its other parameters, whatever {path}.decay_mask '
                'says. Leave it out, or use one group for each (config.optimizer.groups)'
            )
        decay = next((each for each in _DECAYS if each in known), None)
        if decay is not None and not given.get(decay, known[decay].default):
            _log.warning('%s.decay_mask masks nothing: %s.%s is not set', path, at, decay)
        node = paths.changed(node, [*keys, name], mask)
    return node


def _maskable(node: Any, keys: paths.Keys, path: str) -> Iterator[tuple[paths.Keys, str]]:
    """Yields the places of optimizers that take a mask for their decay, and its name there."""
    if isinstance(node, Mapping) and 'target' in node:
        known, _ = learning_rate.parameters(node, path)
        name = next((each for each in _MASKS if each in known), None)
        if name is not None and not str(node['target']).endswith(_OTHERS):
            yield keys, name
    for key, value in learning_rate.items(node):
        yield from _maskable(value, [*keys, key], path)


def _refusal(node: Node, path: str) -> str:
    target = node['target']
    known, _ = learning_rate.parameters(node, path)
    decays = next((each for each in known if 'weight_decay' in each), None)
    if decays is not None:
        return (
            f'{path}.decay_mask: {target} has no argument for a mask: its {decays} is of all '
            f'parameters. Use two groups, one with {decays}=0 (config.optimizer.groups), or '
            'optax:chain with optax:add_decayed_weights, which has a mask'
        )
    return (
        f'{path}.decay_mask: {target} has no weight decay to mask (no argument '
        "'mask' or 'weight_decay_mask'); optax:adamw has"
    )
