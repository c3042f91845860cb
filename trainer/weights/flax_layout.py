# SPDX-License-Identifier: Apache-2.0
"""Finds the model's variables in a checkpoint of this trainer, of Flax or of NNX."""

from __future__ import annotations

from collections.abc import Collection

from trainer.config.errors import UserError
from trainer.weights.leaves import Weights, is_slot, key_path
from trainer.weights.read import Leaves, subtree

Keys = tuple[str, ...]

# Fields of training states beside the parameters that are not variables of the model.
_NOT_VARIABLES = {
    'step', 'opt_state', 'optimizer', 'metrics', 'ema', 'loss_scale', 'dynamic_scale', 'config',
    'rng', 'key', 'collections', 'model_state', 'target', 'state',
}  # fmt: skip
# Where the parameters may be; the first that exists counts, so a path comes before its prefix.
# ('params', 'params') is a training state whose field `params` has all variables; 'target' is the
# model in an optimizer of `flax.optim`.
_PARAMS: tuple[Keys, ...] = (
    ('params', 'params'),
    ('params',),
    ('optimizer', 'target', 'params'),
    ('optimizer', 'target'),
    ('target', 'params'),
    ('target',),
)
# The key of the array in a variable of NNX or a box of Linen.
_BOXED = 'value'


def variables(leaves: Leaves, *, at: str = '', ema: bool = False) -> Weights:
    """Returns the variables among the arrays of a checkpoint: 'params/...', 'batch_stats/...'.

    Args:
        leaves: the arrays, by key path.
        at: path to the training state, the variables or the bare parameters in it: 'model'.
        ema: whether to take the moving average as the parameters.

    Raises:
        UserError: if there is nothing at that path, or no moving average.
    """
    tree = subtree(leaves, at)
    where = next((keys for keys in _PARAMS if _subtree(tree, keys)), None)
    if where is None:  # Bare parameters.
        return _with_collection('params', tree)
    params = _subtree(tree, ('ema',)) if ema else _subtree(tree, where)
    if not params:
        raise UserError('the checkpoint has no moving average: its run had no config.ema')
    weights = _with_collection('params', params)
    if where == ('params', 'params'):  # The other collections are beside the inner 'params'.
        tree = {**tree, **_subtree(tree, ('params',))}
    for name in dict.fromkeys(keys[0] for keys in tree):
        if name not in _NOT_VARIABLES and name != 'params':
            weights.update(_with_collection(name, _subtree(tree, (name,))))
    for keys, leaf in {**_subtree(tree, ('collections',)), **_model_state(tree)}.items():
        weights['/'.join(keys)] = leaf
    return weights


def optimizer_state(leaves: Leaves, key_paths: Collection[str]) -> Weights:
    """Returns the state of an optax optimizer, by path.

    Args:
        leaves: the arrays of a training state, by key path.
        key_paths: key paths of the parameters; the slots are boxed in the same way.
    """
    # The slots are matched with the parameters by path, so both need the box, or neither.
    box = '' if any(path.endswith(f'/{_BOXED}') for path in key_paths) else f'/{_BOXED}'
    slots = ((keys, leaf) for keys, leaf in leaves.items() if keys[0] == 'opt_state')
    return {'/'.join(keys).removesuffix(box): leaf for keys, leaf in slots}


def rename_to_model(weights: Weights, wanted: Collection[str]) -> Weights:
    """Returns the weights under the paths that the model has for the same arrays.

    Boxes ('kernel/value') are added or removed. A state of NNX does not separate collections: an
    array moves to the one collection of the model that has its key path.

    Args:
        weights: arrays by key path; a path without a counterpart in the model stays.
        wanted: the paths of the model.
    """
    collections = {path.partition('/')[0] for path in wanted if not is_slot(path)}
    renamed: Weights = {}
    for path, leaf in weights.items():
        new = path if path in wanted else _model_path(path, wanted, collections)
        # Never overwrite another array.
        renamed[path if new in weights or new in renamed else new] = leaf
    return renamed


def _model_path(path: str, wanted: Collection[str], collections: Collection[str]) -> str:
    """Returns the model's path for an array under another one; without exactly one, the same."""
    # Either side may have the box, and a 'value' removed as a box may be a parameter's own name.
    bare = path.removesuffix(f'/{_BOXED}')
    for new in (bare, f'{path}/{_BOXED}'):
        if new in wanted:
            return new
    if not path.startswith('params/'):
        return path
    owners = [name for name in collections if f'{name}/{key_path(bare)}' in wanted]
    return f'{owners[0]}/{key_path(bare)}' if len(owners) == 1 else path


def _model_state(tree: Leaves) -> Leaves:
    """Returns the `model_state` of training states written for older versions of Flax.

    Before Linen its keys were paths of modules with batch statistics: '/BatchNorm_1'.
    """
    state = {}
    for keys, leaf in _subtree(tree, ('model_state',)).items():
        flat = tuple(filter(None, '/'.join(keys).split('/')))
        state[flat if not keys[0].startswith('/') else ('batch_stats', *flat)] = leaf
    return state


def _subtree(leaves: Leaves, keys: Keys) -> Leaves:
    depth = len(keys)
    return {k[depth:]: leaf for k, leaf in leaves.items() if k[:depth] == keys and len(k) > depth}


def _with_collection(collection: str, leaves: Leaves) -> Weights:
    # Only if all are boxed: a single 'value' may be the name of a parameter.
    if all(keys[-1:] == (_BOXED,) and len(keys) > 1 for keys in leaves):
        leaves = {keys[:-1]: leaf for keys, leaf in leaves.items()}
    return {'/'.join((collection, *keys)): leaf for keys, leaf in leaves.items()}
