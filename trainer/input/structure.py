# SPDX-License-Identifier: Apache-2.0
"""The structure of nested batches: between the tree that users see and a dict of its arrays.

Inside the trainer a batch is a dict of arrays by name, whatever its tree. The name of an array is
its path: 'inputs/x' in nested dicts, 'pair/0' in a tuple, 'graph/nodes' in a NamedTuple.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from trainer.config.errors import UserError
from trainer.input.fields import MASK
from trainer.modules.model_view import param_path


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a nested batch, without its mask.

    Attributes:
        treedef: of the tree.
        names: paths of its arrays, in the order of the tree.
    """

    treedef: Any
    names: tuple[str, ...]

    @classmethod
    def from_tree(cls, tree: Any, where: str) -> Structure | None:
        """Returns the structure of a batch, or None if it is a dict of arrays.

        Args:
            tree: a batch of arrays, or of their shapes and dtypes.
            where: config path of the data, for messages.

        Raises:
            UserError: if two arrays have the same path, because a key has a '/' in it, or the tree
                has no arrays.
        """
        tree = without_mask(tree)
        if is_flat(tree):
            return None
        paths, treedef = _flatten_with_paths(tree)
        names = tuple(param_path(path) for path, _ in paths)
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f'{where}: two arrays of the batch are named {name!r}, a key with a slash in '
                    'it and a path of keys; rename the key'
                )
        if not names:
            raise UserError(f'{where}: the batch has no arrays')
        return cls(treedef, names)

    @property
    def has_place_for_mask(self) -> bool:
        """Whether the top of the tree is a dict, which can have `_mask` in it."""
        return isinstance(self.template, Mapping)

    @functools.cached_property
    def template(self) -> Any:
        """The tree with the names of the arrays in their places."""
        return jax.tree.unflatten(self.treedef, self.names)

    def flatten(self, tree: Any, where: str) -> dict[str, Any]:
        """Returns the arrays of a batch by name, with the mask if the batch has one.

        Args:
            tree: a batch of this structure.
            where: what messages name.

        Raises:
            UserError: if it has another structure.
        """
        inner = without_mask(tree)
        leaves, treedef = jax.tree.flatten(inner, is_leaf=is_array)
        if treedef != self.treedef:
            raise UserError(f'{where}: {self._difference(inner)}')
        fields = dict(zip(self.names, leaves, strict=True))
        if isinstance(tree, Mapping) and MASK in tree:
            fields[MASK] = tree[MASK]
        return fields

    def rebuild(self, fields: Mapping[str, Any], make_dict: Callable[[Any], Any] = dict) -> Any:
        """Returns the tree of a batch, without its mask.

        Args:
            fields: the arrays by name.
            make_dict: makes the dicts at the top of the tree and directly below other dicts, from
                dicts.
        """

        def build(node: Any) -> Any:
            if type(node) is dict:
                return make_dict({key: build(value) for key, value in node.items()})
            return jax.tree.map(lambda name: fields[name], node)

        return build(self.template)

    def select(self, path: str) -> Structure:
        """Returns the structure of a node of the tree; its arrays keep their whole paths.

        Args:
            path: such as 'inputs', of a node and not of an array.
        """

        # A key may have slashes, so several keys may begin the path.
        def find(node: Any, rest: str) -> Any:
            for key, child in _children(node):
                name = param_path(key)
                if rest == name:
                    return child
                if rest.startswith(f'{name}/') and (found := find(child, rest[len(name) + 1 :])):
                    return found
            return None

        return Structure._from_template(find(self.template, path))

    def restrict(self, names: Collection[str]) -> Structure:
        """Returns the structure with some of the arrays only, in plain containers.

        The others are left out of dicts, and None in lists and tuples. NamedTuples and other
        classes become dicts: no caller needs to know them.
        """

        def prune(node: Any) -> Any:
            children = _children(node)
            if not children:
                return node if node in names else None
            pruned = [prune(child) for _, child in children]
            if type(node) in (list, tuple):
                return type(node)(pruned)
            keys = [key.key if type(node) is dict else param_path((key,)) for (key,), _ in children]
            items = zip(keys, pruned, strict=True)
            return {key: child for key, child in items if jax.tree.leaves(child)}

        return Structure._from_template(prune(self.template))

    @classmethod
    def _from_template(cls, template: Any) -> Structure:
        names, treedef = jax.tree.flatten(template)
        return cls(treedef, tuple(names))

    def _difference(self, tree: Any) -> str:
        """Returns how a batch differs from this structure."""
        paths, treedef = _flatten_with_paths(tree)
        found = [param_path(path) for path, _ in paths]
        if missing := [name for name in self.names if name not in found]:
            return f'a batch lacks {", ".join(missing)}, which the first one had'
        if new := [name for name in found if name not in self.names]:
            return f'a batch has {", ".join(new)}, which the first one had not'
        return (
            f'a batch is {treedef}, and the first one was {self.treedef}; all batches need one '
            'structure'
        )


def is_array(value: Any) -> bool:
    """Whether a value is an array, or the shape and dtype of one."""
    return hasattr(value, 'dtype') and hasattr(value, 'shape')


def is_flat(tree: Any) -> bool:
    """Whether a batch is a dict of arrays, with no tree of them below."""
    # Of numpy arrays, as the blocks of a loader: a check that costs little.
    if type(tree) is dict and {np.ndarray}.issuperset(map(type, tree.values())):
        return True
    return isinstance(tree, Mapping) and jax.tree_util.all_leaves(tree.values(), is_leaf=is_array)


def check_arrays(fields: Mapping[str, Any], where: str) -> None:
    """Checks that all leaves of a batch are arrays, or their shapes and dtypes.

    Raises:
        UserError: naming one that is not.
    """
    for name, x in fields.items():
        if not is_array(x):
            raise UserError(
                f'{where}: {name!r} of a batch is of type {type(x).__name__}; expected an array. '
                'A class of your own must be registered as a JAX pytree '
                '(jax.tree_util.register_dataclass)'
            )


def without_mask(tree: Any) -> Any:
    """Returns a batch without `_mask`; its top is of the type `dict` if it is any mapping."""
    if isinstance(tree, Mapping):
        return {name: x for name, x in tree.items() if name != MASK}
    return tree


def _children(node: Any) -> list[tuple[Any, Any]]:
    """Returns the items of a node, each with its key path of one key; none for a leaf."""
    pairs = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    return [(path, child) for path, child in pairs if path]


def _flatten_with_paths(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
