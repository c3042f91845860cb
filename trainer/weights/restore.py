# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints of any supported format from Python: as nested dicts, or into a pytree.

For notebooks, and for training states of `flax.training.train_state` or of your own. A run takes
its weights from `config.init_from` instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.core import meta

from trainer.config.errors import UserError, indented_list
from trainer.modules.model_view import path_names
from trainer.modules.shapes import describe
from trainer.weights import flax_layout, pre_linen, torch_layout
from trainer.weights import leaves as lib
from trainer.weights.first_state import match_weights
from trainer.weights.init_from import InitFrom
from trainer.weights.read import Leaves, open_raw, open_texts, open_tree, subtree
from trainer.weights.surgery import Operation, apply_operations

_log = logging.getLogger('trainer')
# The allowed pairs of (kind in the checkpoint, kind in the target): integers fit into floats.
_ALLOWED = (['text', 'text'], ['exact', 'exact'], ['inexact', 'inexact'], ['exact', 'inexact'])


def raw(path: epath.PathLike, step: str | int = 'latest', *, at: str = '') -> Any:
    """Returns everything in a checkpoint, or below a key path, without a target.

    Args:
        path: file or directory; see `trainer.weights.read.open_raw`.
        step: which of several checkpoints: 'latest', 'best' or a number.
        at: the key path: 'model/params'; numbers are indices of a list.

    Raises:
        UserError: if there is no such checkpoint, or nothing at that key path.
    """
    tree = open_raw(path, step)
    for name in filter(None, at.split('/')):
        try:
            tree = tree[int(name) if isinstance(tree, list) else name]
        except (LookupError, TypeError, ValueError):
            available = indented_list(list(tree) if isinstance(tree, dict) else [describe(tree)])
            raise UserError(f'{path} has no {name!r} of {at!r}; available:\n{available}') from None
    return tree


def model_variables(
    path: epath.PathLike,
    step: str | int = 'latest',
    *,
    at: str = '',
    before_linen: bool = False,
    surgery: Sequence[Operation] = (),
) -> dict[str, Any]:
    """Returns variables for Linen's `apply`, {'params': ..., 'batch_stats': ...}, as numpy arrays.

    Args:
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints: 'latest', 'best' or a number.
        at: key path of the training state, the variables or the bare parameters in it.
        before_linen: whether the modules are named as `flax.nn` did.
        surgery: operations to apply, in order.

    Raises:
        UserError: if there is no such checkpoint.
    """
    weights = flax_layout.variables(open_tree(path, step), at=at)
    if before_linen:
        weights = pre_linen.convert(weights)
    return lib.to_nested(apply_operations(surgery, weights))


def torch_variables(
    state_dict: Mapping[str, Any],
    variables: Any,
    *,
    rename: Sequence[tuple[str, str]] = (),
    flatten: Sequence[torch_layout.Flatten] = (),
) -> dict[str, Any]:
    """Returns variables for Linen's `apply` with the values of a PyTorch model, as numpy arrays.

    Args:
        state_dict: `state_dict()` of the PyTorch model, with tensors or numpy arrays.
        variables: those of the Flax model, from `init`, or their shapes; boxes are removed.
        rename: (pattern, replacement) pairs, as in `config.init_from.rename`, from key paths such
            as 'layer1/0/conv1/weight' to those of the Flax model's modules.
        flatten: dense layers after a flattening; see `trainer.weights.torch_layout.convert`.

    Raises:
        UserError: naming arrays that are missing or do not fit.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise UserError(f'state_dict: expected a mapping, such as model.state_dict(); got a {kind}')
    init_from = InitFrom(
        path='the state_dict',  # For messages: it is never opened.
        layout='torch',
        rename=tuple(rename),
        flatten=tuple(flatten),
        where='',
    )
    leaves: Leaves = {
        tuple(name.split('.')): lib.HostLeaf(torch_layout.as_numpy(x))
        for name, x in state_dict.items()
    }
    goal = lib.flatten(meta.unbox(variables))
    weights = init_from.from_torch(leaves, {path: tuple(x.shape) for path, x in goal.items()})
    return lib.to_nested(match_weights(weights, goal, init_from))


def into(
    target: Any,
    path: epath.PathLike,
    step: str | int = 'latest',
    *,
    at: str = '',
    on_missing: Literal['error', 'init'] = 'error',
) -> Any:
    """Returns a pytree like `target` with the values of a checkpoint.

    Leaves that only the checkpoint has are ignored, and what is not a leaf (a function, an
    optimizer) comes from the target. Restored are: arrays of JAX, typed keys and shapes with a
    sharding as arrays of that sharding, strings as strings, and all other leaves as numpy arrays.

    Args:
        target: any pytree of arrays or their shapes, such as a dataclass of `flax.struct`.
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints: 'latest', 'best' or a number.
        at: key path of the counterpart of the target in the checkpoint.
        on_missing: 'error' to refuse a checkpoint without all leaves of the target, 'init' to keep
            the target's values of those it does not have.

    Raises:
        UserError: naming leaves that are missing, have another shape, or would lose fractions.
    """
    wanted = jax.tree_util.tree_leaves_with_path(target)
    has_texts = any(isinstance(x, str) for _, x in wanted)
    texts = open_texts(path, step) if has_texts else {}
    # As numpy arrays, so that shapes and kinds of strings are checked like those of numbers.
    text_leaves = {keys: lib.HostLeaf(np.asarray(text)) for keys, text in texts.items()}
    leaves = subtree({**open_tree(path, step), **text_leaves}, at)
    names = {path_names(keys): _stored_form(x) for keys, x in wanted}
    _check_leaves(leaves, names, path, on_missing)
    shapes = (keys for keys, x in wanted if isinstance(x, jax.ShapeDtypeStruct))
    if empty := ['/'.join(n) for n in map(path_names, shapes) if n not in leaves]:
        raise UserError(
            f'missing from {path}, and the target has no value:\n{indented_list(empty)}\n'
            "on_missing='init' keeps the target's values, but these leaves are only shapes."
        )

    available = {'/'.join(keys): leaf for keys, leaf in leaves.items() if keys in names}
    # Leaves with a sharding are read onto the devices shard by shard, all others into host memory.
    placed = {'/'.join(keys): x for keys, x in names.items() if _sharding(x) is not None}
    loaded: dict[str, Any] = dict(
        lib.read_arrays({p: x for p, x in available.items() if p not in placed})
    )
    loaded.update(lib.load({p: x for p, x in available.items() if p in placed}, placed))

    def pick(keys: Any, x: Any) -> Any:
        name = '/'.join(path_names(keys))
        if name not in loaded:
            return x
        if isinstance(x, str):
            return str(loaded[name])
        return _convert_key(loaded[name], x)

    return jax.tree_util.tree_map_with_path(pick, target)


def _stored_form(x: Any) -> Any:
    """Returns a leaf as a checkpoint stores it: a typed key as its data."""
    if _is_key(x):
        return jax.eval_shape(jax.random.key_data, x)
    return x if hasattr(x, 'shape') else np.asarray(x)


def _is_key(x: Any) -> bool:
    return hasattr(x, 'dtype') and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _convert_key(value: Any, target: Any) -> Any:
    """Returns a value as a typed key, or as the data of one, if the target needs that."""
    if not _is_key(target):
        return jax.random.key_data(value) if _is_key(value) else value
    # The implementation of a key: `key_impl` accepts tracers, but not the shape of a key.
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), target)
    return jax.device_put(
        jax.random.wrap_key_data(jnp.asarray(value), impl=kinds[0]), _sharding(target)
    )


def _sharding(x: Any) -> Any:
    return getattr(x, 'sharding', None)


def _check_leaves(leaves: Leaves, wanted: dict[Any, Any], path: Any, on_missing: str) -> None:
    if on_missing not in ('error', 'init'):
        raise UserError(f"on_missing={on_missing!r}: expected 'error' or 'init'")
    missing = ['/'.join(keys) for keys in wanted if keys not in leaves]
    other = [
        f'{"/".join(keys)}: got {describe(leaves[keys])}, the target has {describe(x)}'
        for keys, x in wanted.items()
        if keys in leaves and not _is_compatible(leaves[keys], x)
    ]
    if other:
        text = 'has other shapes or kinds of dtype than the target'
        raise UserError(f'{path} {text}:\n{indented_list(other)}')
    if missing and on_missing == 'error':
        spare = ['/'.join(keys) for keys in leaves if keys not in wanted]
        ignored = f'Not in the target:\n{indented_list(spare)}\n' if spare else ''
        raise UserError(
            f'missing from {path}:\n{indented_list(missing)}\n{ignored}'
            "on_missing='init' keeps the target's values of missing leaves."
        )
    if missing:
        text = "missing leaves that keep the target's values"
        _log.warning('%s: %s (%d):\n%s', path, text, len(missing), indented_list(missing))


def _is_compatible(leaf: Any, target: Any) -> bool:
    """Whether the shapes agree, and no string or fraction would be lost."""
    kinds = [_value_kind(x) for x in (leaf, target)]
    return tuple(leaf.shape) == tuple(target.shape) and kinds in _ALLOWED


def _value_kind(x: Any) -> str:
    if np.issubdtype(x.dtype, np.str_):
        return 'text'
    return 'inexact' if jnp.issubdtype(x.dtype, jnp.inexact) else 'exact'
