# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of `flax.optim` hold for parameters, as optax's hold it."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.weights.leaves import Weights, is_slot
from trainer.weights.read import Leaves

# The last name of optax's slot for each of Adam's, LAMB's and Momentum's there: equal numbers.
_SLOTS = {'grad_ema': 'mu', 'grad_sq_ema': 'nu', 'momentum': 'trace'}
_STATE = ('optimizer', 'state')


def slots(leaves: Leaves, wanted: Iterable[str]) -> Weights:
    """Returns the slots of a checkpoint's parameters, under the names of the new optimizer.

    Args:
        leaves: of a training state with an optimizer of `flax.optim`.
        wanted: paths of the new run's slots: 'opt_state.0.mu/Dense_0/kernel', 'opt_state.0.count'.
    """
    collections = dict.fromkeys(path.partition('/')[0] for path in wanted if is_slot(path))
    found: Weights = {}
    for keys, leaf in leaves.items():
        if keys == (*_STATE, 'step'):
            counts = (name for name in collections if name.endswith('.count'))
            found.update(dict.fromkeys(counts, leaf))
        if keys[:3] != (*_STATE, 'param_states') or keys[-1] not in _SLOTS:
            continue
        place = '/'.join(keys[4:-1] if keys[3] == 'params' else keys[3:-1])
        ending = f'.{_SLOTS[keys[-1]]}'
        found.update({f'{n}/{place}': leaf for n in collections if n.endswith(ending)})
    return found
