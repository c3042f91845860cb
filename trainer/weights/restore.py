# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of anybody's, from Python: as nested dicts, or into an object of yours.

For a notebook, and for a training state of `flax.training.train_state` or of your own. A run takes
its weights from `config.init_from`.
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

from trainer.config.errors import UserError
from trainer.config.text import indented_list
from trainer.modules.shapes import describe
from trainer.weights import flax_layout, pre_linen, torch_layout
from trainer.weights import leaves as lib
from trainer.weights.first_state import matched
from trainer.weights.init_from import InitFrom
from trainer.weights.read import Leaves, below, open_raw, open_texts, open_tree
from trainer.weights.surgery import Operation, operated

_log = logging.getLogger('trainer')
# What goes into what.
_KINDS = (['text', 'text'], ['exact', 'exact'], ['inexact', 'inexact'], ['exact', 'inexact'])


def raw(path: epath.PathLike, step: str | int = 'latest', *, at: str = '') -> Any:
    """Returns everything in a checkpoint, or at a place in it, without a target.

    Args:
        path: file or directory; see `trainer.weights.read.open_raw`.
        step: which of several checkpoints.
        at: the place: 'model/params'; numbers count the entries of a list.

    Raises:
        UserError: if there is no such checkpoint, or nothing at that place.
    """
    tree = open_raw(path, step)
    for name in filter(None, at.split('/')):
        try:
            tree = tree[int(name) if isinstance(tree, list) else name]
        except (LookupError, TypeError, ValueError):
            held = list(tree) if isinstance(tree, dict) else [describe(tree)]
            raise UserError(
                f'{path} has no {name!r} of {at!r}; there is\n{indented_list(held)}'
            ) from None
    return tree


def model_variables(
    path: epath.PathLike,
    step: str | int = 'latest',
    *,
    at: str = '',
    before_linen: bool = False,
    surgery: Sequence[Operation] = (),
) -> dict[str, Any]:
    """Returns what Linen's `apply` takes, {'params': ..., 'batch_stats': ...}, as numpy arrays.

    Args:
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints.
        at: where in it the training state, the variables or the bare parameters are.
        before_linen: whether it was `flax.nn` that numbered the sub-modules.
        surgery: what is done to them, in order.

    Raises:
        UserError: if there is no such checkpoint.
    """
    found = flax_layout.variables(open_tree(path, step), at=at)
    if before_linen:
        found = pre_linen.convert(found)
    return lib.nested(operated(surgery, found))


def torch_variables(
    state_dict: Mapping[str, Any],
    variables: Any,
    *,
    rename: Sequence[tuple[str, str]] = (),
    flatten: Sequence[torch_layout.Flatten] = (),
) -> dict[str, Any]:
    """Returns variables of Linen's `apply` with the values of a PyTorch model, as numpy arrays.

    Args:
        state_dict: of the PyTorch model, as tensors or as arrays of numpy.
        variables: of the Flax model: what `init` returns, or its shapes; boxes are taken off.
        rename: (pattern, replacement) pairs, as `config.init_from.rename` takes them, from paths
            such as 'layer1/0/conv1/weight' to those of the Flax model's modules.
        flatten: dense layers after a flattening; see `trainer.weights.torch_layout.convert`.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise UserError(f'state_dict: expected that of a model, model.state_dict(); got a {kind}')
    chosen = InitFrom(
        path='the state_dict',
        layout='torch',
        rename=tuple(rename),
        flatten=tuple(flatten),
        where='',
    )
    leaves: Leaves = {
        tuple(name.split('.')): lib.HostLeaf(torch_layout.as_numpy(x))
        for name, x in state_dict.items()
    }
    goal = lib.flat(meta.unbox(variables))
    found = chosen.from_torch(leaves, {path: tuple(x.shape) for path, x in goal.items()})
    return lib.nested(matched(found, goal, chosen))


def into(
    target: Any,
    path: epath.PathLike,
    step: str | int = 'latest',
    *,
    at: str = '',
    on_missing: Literal['error', 'init'] = 'error',
) -> Any:
    """Returns an object like `target` with the arrays of a checkpoint in it.

    What cannot be saved (a function, an optimizer) is the target's own. What only the checkpoint
    has is left out. An array of JAX keeps its sharding, as a shape with a sharding and a typed key
    do; a text becomes the checkpoint's, any other leaf an array of numpy.

    Args:
        target: any pytree, such as a dataclass of `flax.struct`, of arrays or of their shapes.
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints.
        at: where in it the counterpart of the target is.
        on_missing: what becomes of leaves that the checkpoint lacks: an error, or they stay.

    Raises:
        UserError: naming leaves that are missing or of another shape, or fractions for integers.
    """
    wanted = jax.tree_util.tree_leaves_with_path(target)
    has_texts = any(isinstance(x, str) for _, x in wanted)
    texts = open_texts(path, step) if has_texts else {}
    held = {keys: lib.HostLeaf(np.asarray(text)) for keys, text in texts.items()}
    leaves = below({**open_tree(path, step), **held}, at)
    names = {lib.keys_of(keys): _stored(x) for keys, x in wanted}
    _check(leaves, names, path, on_missing)
    shapes = (keys for keys, x in wanted if isinstance(x, jax.ShapeDtypeStruct))
    if empty := ['/'.join(n) for n in map(lib.keys_of, shapes) if n not in leaves]:
        raise UserError(
            f'{path} lacks what the target has no value of:\n{indented_list(empty)}\n'
            "on_missing='init' keeps values, and these are shapes alone."
        )

    there = {'/'.join(keys): leaf for keys, leaf in leaves.items() if keys in names}
    placed = {'/'.join(keys): x for keys, x in names.items() if _sharding(x) is not None}
    loaded: dict[str, Any] = dict(lib.hosts({p: x for p, x in there.items() if p not in placed}))
    loaded.update(lib.load({p: x for p, x in there.items() if p in placed}, placed))

    def pick(keys: Any, x: Any) -> Any:
        name = '/'.join(lib.keys_of(keys))
        if name not in loaded:
            return x
        if isinstance(x, str):
            return str(loaded[name])
        return _like(loaded[name], x)

    return jax.tree_util.tree_map_with_path(pick, target)


def _stored(x: Any) -> Any:
    """Returns a leaf as a checkpoint holds it: of a typed key its data."""
    if _is_key(x):
        return jax.eval_shape(jax.random.key_data, x)
    return x if hasattr(x, 'shape') else np.asarray(x)


def _is_key(x: Any) -> bool:
    return hasattr(x, 'dtype') and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _like(found: Any, target: Any) -> Any:
    """Returns an array as a typed key of the target's kind, or the data of one, if need be."""
    if not _is_key(target):
        return jax.random.key_data(found) if _is_key(found) else found
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), target)
    return jax.device_put(
        jax.random.wrap_key_data(jnp.asarray(found), impl=kinds[0]), _sharding(target)
    )


def _sharding(x: Any) -> Any:
    return getattr(x, 'sharding', None)


def _check(leaves: Leaves, wanted: dict[Any, Any], path: Any, on_missing: str) -> None:
    if on_missing not in ('error', 'init'):
        raise UserError(f"on_missing: {on_missing!r} is none of 'error', 'init'")
    missing = ['/'.join(keys) for keys in wanted if keys not in leaves]
    other = [
        f'{"/".join(keys)}: {describe(leaves[keys])} there, {describe(x)} in the target'
        for keys, x in wanted.items()
        if keys in leaves and not _goes_into(leaves[keys], x)
    ]
    if other:
        text = 'other shapes or kinds of number than the target'
        raise UserError(f'{path} holds {text}:\n{indented_list(other)}')
    if missing and on_missing == 'error':
        spare = ['/'.join(keys) for keys in leaves if keys not in wanted]
        besides = f'It has besides\n{indented_list(spare)}\n' if spare else ''
        raise UserError(
            f'{path} lacks what the target has:\n{indented_list(missing)}\n{besides}'
            "on_missing='init' leaves what is missing as it is in the target."
        )
    if missing:
        text = 'are not there, and stay as they are in the target'
        _log.warning('%s: %d leaves %s:\n%s', path, len(missing), text, indented_list(missing))


def _goes_into(leaf: Any, target: Any) -> bool:
    """Whether the shapes agree, and no text or fraction would be lost."""
    kinds = [_kind(x) for x in (leaf, target)]
    return tuple(leaf.shape) == tuple(target.shape) and kinds in _KINDS


def _kind(x: Any) -> str:
    if np.issubdtype(x.dtype, np.str_):
        return 'text'
    return 'inexact' if jnp.issubdtype(x.dtype, jnp.inexact) else 'exact'
