# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a checkpoint are the model's variables, whoever wrote it."""

from __future__ import annotations

from trainer.config.errors import UserError
from trainer.transfer.opening import Leaves, below
from trainer.transfer.weights import Weights

Keys = tuple[str, ...]

# What stands beside the parameters in a training state and is no variable of the model.
_NO_VARIABLES = {
    'step', 'opt_state', 'optimizer', 'metrics', 'ema', 'loss_scale', 'dynamic_scale', 'config',
    'rng', 'key', 'collections', 'model_state', 'target', 'state',
}  # fmt: skip
# Where the parameters are, the first that is there: in a training state of today, in variables that
# are called parameters, below an optimizer of `flax.optim`.
_PARAMS: tuple[Keys, ...] = (
    ('params', 'params'),
    ('params',),
    ('optimizer', 'target', 'params'),
    ('optimizer', 'target'),
    ('target', 'params'),
    ('target',),
)


def variables(leaves: Leaves, *, at: str = '', ema: bool = False) -> Weights:
    """Returns the variables among the arrays of a checkpoint: 'params/...', 'batch_stats/...'.

    Args:
        leaves: by their paths of keys.
        at: where in it the training state, the variables or the bare parameters are: 'model'.
        ema: take the moving average for the parameters.

    Raises:
        UserError: if nothing is there, or no moving average.
    """
    tree = below(leaves, at)
    where = next((keys for keys in _PARAMS if _below(tree, keys)), None)
    if where is None:
        return _named('params', tree)
    params = _below(tree, ('ema',)) if ema else _below(tree, where)
    if not params:
        raise UserError('the checkpoint holds no moving average: its run had no config.ema')
    found = _named('params', params)
    if where == ('params', 'params'):  # What was called parameters are all the variables.
        tree = {**tree, **_below(tree, ('params',))}
    for name in dict.fromkeys(keys[0] for keys in tree):
        if name not in _NO_VARIABLES and name != 'params':
            found.update(_named(name, _below(tree, (name,))))
    for keys, leaf in {**_below(tree, ('collections',)), **_model_state(tree)}.items():
        found['/'.join(keys)] = leaf
    return found


def _model_state(tree: Leaves) -> Leaves:
    """Returns what a state of the old world calls so; before Linen, '/BatchNorm_1' are its keys."""
    found = {}
    for keys, leaf in _below(tree, ('model_state',)).items():
        flat = tuple(filter(None, '/'.join(keys).split('/')))
        found[flat if not keys[0].startswith('/') else ('batch_stats', *flat)] = leaf
    return found


def _below(leaves: Leaves, keys: Keys) -> Leaves:
    deep = len(keys)
    return {k[deep:]: leaf for k, leaf in leaves.items() if k[:deep] == keys and len(k) > deep}


def _named(collection: str, leaves: Leaves) -> Weights:
    return {'/'.join((collection, *keys)): leaf for keys, leaf in leaves.items()}
