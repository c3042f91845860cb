# SPDX-License-Identifier: Apache-2.0
"""Passes `config.optimizer.decay_mask` to the optimizers as their weight decay mask."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from trainer.builders import nodes
from trainer.config import paths
from trainer.config.errors import UserError
from trainer.config.sections import Node
from trainer.step.optimizer import RegexMask

_log = logging.getLogger('trainer')

# Names of the arguments for the weight decay mask, and for the decay itself.
_MASKS = ('weight_decay_mask', 'mask')
_DECAYS = ('weight_decay', 'weight_decay_rate')

# Targets whose `mask` has another meaning.
_OTHERS = (':masked', ':freeze')

# An argument of optax.contrib:muon: a decay that its mask does not apply to.
_UNMASKED = 'adam_weight_decay'


def mask_decay(node: Node, path: str, mask: RegexMask) -> Node:
    """Returns an optimizer's node in which every target with weight decay gets a mask.

    Args:
        node: the optimizer's node.
        path: config path of the node, for messages.
        mask: selects the parameters that decay.

    Raises:
        UserError: if no target takes such a mask, or one has a mask already.
    """
    # All of them: an optax:chain may contain several targets with weight decay.
    maskable = list(_find_maskable(node, path))
    if not maskable:
        raise UserError(_no_mask_message(node, path))
    for keys, name in maskable:
        where = f'{path}.{paths.join(keys)}'.rstrip('.')
        owner = paths.get(node, keys)
        known, names = nodes.parameters(owner, path)
        given = {each: paths.get(owner, list(key_path)) for key_path, each in names.items()}
        if name in given:
            raise UserError(
                f'{path}.decay_mask and {where}.{name} both select the parameters that decay; '
                'remove one of them'
            )
        if given.get(_UNMASKED):
            raise UserError(
                f'{where}.{_UNMASKED}: {owner["target"]} masks the weight decay of its matrices '
                'only; this one would decay all its other parameters, regardless of '
                f'{path}.decay_mask. Remove it, or use a group for each (config.optimizer.groups)'
            )
        decay = next((each for each in _DECAYS if each in known), None)
        # A warning and no error, because an override may set the decay to 0 for an experiment.
        if decay is not None and not given.get(decay, known[decay].default):
            _log.warning('%s.decay_mask has no effect: %s.%s is not set', path, where, decay)
        node = paths.with_value(node, [*keys, name], mask)
    return node


def _find_maskable(node: Node, path: str) -> Iterator[tuple[paths.Keys, str]]:
    """Yields the key path of each target with a weight decay mask, and the argument's name."""
    for keys, inner in nodes.walk(node):
        if isinstance(inner, Mapping) and 'target' in inner:
            known, _ = nodes.parameters(inner, path)
            name = next((each for each in _MASKS if each in known), None)
            if name is not None and not str(inner['target']).endswith(_OTHERS):
                yield keys, name


def _no_mask_message(node: Node, path: str) -> str:
    target = node['target']
    known, _ = nodes.parameters(node, path)
    # Some optimizers decay, but take no mask.
    decay = next((each for each in known if 'weight_decay' in each), None)
    if decay is not None:
        return (
            f'{path}.decay_mask: {target} has no mask argument: its {decay} applies to all '
            f'parameters. Use two groups, one with {decay}=0 (config.optimizer.groups), or '
            'optax:chain with optax:add_decayed_weights, which takes a mask'
        )
    return (
        f'{path}.decay_mask: {target} has no weight decay to mask (no argument '
        "'mask' or 'weight_decay_mask'); optax:adamw has"
    )
