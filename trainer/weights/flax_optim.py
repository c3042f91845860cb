# SPDX-License-Identifier: Apache-2.0
"""Converts optimizer states of `flax.optim`, the predecessor of optax."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.weights.leaves import Weights, is_slot
from trainer.weights.read import Leaves

# The name of optax's slot for each slot of Adam, LAMB and Momentum there; the values are the same.
_SLOTS = {'grad_ema': 'mu', 'grad_sq_ema': 'nu', 'momentum': 'trace'}
_STATE = ('optimizer', 'state')


def slots(leaves: Leaves, wanted: Iterable[str]) -> Weights:
    """Returns the slots of a checkpoint, under the paths of the new optimizer.

    Args:
        leaves: a training state with an optimizer of `flax.optim`, by key path.
        wanted: paths of the new run's slots: 'opt_state.0.mu/Dense_0/kernel', 'opt_state.0.count'.
    """
    collections = dict.fromkeys(path.partition('/')[0] for path in wanted if is_slot(path))
    converted: Weights = {}
    for keys, leaf in leaves.items():
        # flax.optim has one step for all parameters; each optax transformation counts for itself.
        if keys == (*_STATE, 'step'):
            counts = (name for name in collections if name.endswith('.count'))
            converted.update(dict.fromkeys(counts, leaf))
        if keys[:3] != (*_STATE, 'param_states') or keys[-1] not in _SLOTS:
            continue
        parameter = '/'.join(keys[4:-1] if keys[3] == 'params' else keys[3:-1])
        ending = f'.{_SLOTS[keys[-1]]}'
        converted.update({f'{n}/{parameter}': leaf for n in collections if n.endswith(ending)})
    return converted
