# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a checkpoint are the model's variables, whoever wrote it."""

from __future__ import annotations

from collections.abc import Collection

from trainer.config.errors import UserError
from trainer.weights.leaves import Weights, is_slot, place
from trainer.weights.read import Leaves, below

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
# Under which NNX's variables and Linen's boxes hold their array.
_BOXED = 'value'


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


def optimizer_state(leaves: Leaves, places: Collection[str]) -> Weights:
    """Returns what an optax optimizer holds, by path, boxed as the places of the parameters are."""
    box = '' if any(place.endswith(f'/{_BOXED}') for place in places) else f'/{_BOXED}'
    held = ((keys, leaf) for keys, leaf in leaves.items() if keys[0] == 'opt_state')
    return {'/'.join(keys).removesuffix(box): leaf for keys, leaf in held}


def of_model(weights: Weights, wanted: Collection[str]) -> Weights:
    """Returns the weights under those paths that the model has for the same arrays.

    A box ('kernel/value') may be around some of the arrays only, and a state of NNX has batch
    statistics beside the parameters: each goes to the one collection that has its place.

    Args:
        weights: by path; what is neither stays as it is.
        wanted: the paths of the model.
    """
    collections = {path.partition('/')[0] for path in wanted if not is_slot(path)}
    found: Weights = {}
    for path, leaf in weights.items():
        new = path if path in wanted else _meant(path, wanted, collections)
        found[path if new in weights or new in found else new] = leaf
    return found


def _meant(path: str, wanted: Collection[str], collections: Collection[str]) -> str:
    """Returns the model's path for one that it does not have; if there is none, or two, the same.

    What was taken for a box may be a parameter of that name.
    """
    bare = path.removesuffix(f'/{_BOXED}')
    for new in (bare, f'{path}/{_BOXED}'):
        if new in wanted:
            return new
    held = [name for name in collections if f'{name}/{place(bare)}' in wanted]
    return f'{held[0]}/{place(bare)}' if path.startswith('params/') and len(held) == 1 else path


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
    if all(keys[-1:] == (_BOXED,) and len(keys) > 1 for keys in leaves):
        leaves = {keys[:-1]: leaf for keys, leaf in leaves.items()}
    return {'/'.join((collection, *keys)): leaf for keys, leaf in leaves.items()}
