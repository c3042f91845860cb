# SPDX-License-Identifier: Apache-2.0
"""`config.init_from`: selects weights of a checkpoint, and renames them for the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from trainer.config.errors import UserError, indented_list, short_repr
from trainer.input.data import Data
from trainer.input.fingerprint import check_vocabulary
from trainer.modules import patterns
from trainer.weights import flax_layout, flax_optim, pre_linen, torch_layout
from trainer.weights import leaves as lib
from trainer.weights.leaves import Weights, key_path
from trainer.weights.read import Leaves, open_metadata, open_tree, subtree

WHERE = 'config.init_from'
_PAIRS = {
    'rename': '(pattern, replacement) pairs',
    'flatten': '(pattern, (channels, height, width)) pairs',
}
# The collection of PyTorch tensors that no array of the model uses.
TENSORS = 'torch/'


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The checkpoint that a fresh run takes its weights from.

    Patterns match whole key paths of variables of this model, such as 'Dense_0/kernel'.

    Attributes:
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints: 'latest', 'best' or a number.
        at: path to the state, the variables or the bare parameters in the checkpoint.
        layout: the names in it: those of Flax, of Flax before Linen, or of PyTorch.
        member: index of a member, if the checkpoint is that of an ensemble.
        include: patterns of variables to load; empty for all.
        exclude: patterns of variables that keep their initial values although they are included.
        rename: (pattern, replacement) pairs, applied in order to the key paths of the checkpoint
            by `re.sub`: a pattern may match a part of the path.
        flatten: for PyTorch: see `trainer.weights.torch_layout.convert`.
        on_missing: 'error' to refuse a checkpoint without all selected variables, 'init' to keep
            the initial values of those it does not have.
        ema: whether to load the moving average of that run as the parameters.
        optimizer: whether to load the slots of the optimizer too, such as Adam's moments.
        vocabulary: 'same' to refuse a run of this trainer whose data had other tokens, 'any' to
            load it.
        where: what messages put before the name of an attribute.
    """

    path: str
    step: str | int = 'latest'
    at: str = ''
    layout: Literal['flax', 'pre_linen', 'torch'] = 'flax'
    member: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    flatten: tuple[torch_layout.Flatten, ...] = ()
    on_missing: Literal['error', 'init'] = 'error'
    ema: bool = False
    optimizer: bool = False
    vocabulary: Literal['same', 'any'] = 'same'
    where: str = f'{WHERE}.'

    def __post_init__(self) -> None:
        """Raises a UserError for an invalid pattern, and for keys that exclude each other."""
        for name in ('include', 'exclude', 'rename', 'flatten'):
            for entry in getattr(self, name):
                if name in _PAIRS and (isinstance(entry, str) or len(entry) != 2):
                    raise UserError(
                        f'{self.where}{name}: expected {_PAIRS[name]}, got {short_repr(entry)}'
                    )
                pattern = entry if isinstance(entry, str) else entry[0]
                patterns.compile_pattern(pattern, f'{self.where}{name}')
        if self.flatten and self.layout != 'torch':
            raise UserError(
                f"{self.where}flatten is for PyTorch only: set {self.where}layout='torch' too"
            )
        for name, layouts in (('ema', ('flax',)), ('optimizer', ('flax', 'pre_linen'))):
            if getattr(self, name) and self.layout not in layouts:
                raise UserError(f'{self.where}{name} is not supported with layout={self.layout!r}')
        if self.layout != 'flax' and self.member is not None:
            raise UserError(f'{self.where}member is not supported with layout={self.layout!r}')

    @property
    def in_config(self) -> bool:
        """Whether these are keys of a config, rather than arguments of a function."""
        return self.where == f'{WHERE}.'

    @property
    def title(self) -> str:
        """The beginning of messages that are not about a single key."""
        return f'{WHERE}: ' if self.in_config else ''

    def check_vocabulary(self, data: Data) -> None:
        """Raises a UserError if the checkpoint is one of a run whose data had other tokens."""
        if self.vocabulary == 'any':
            return
        check_vocabulary(
            data,
            open_metadata(self.path, self.step).get('data'),
            f'{WHERE}.path: {self.path}',
            f"set {WHERE}.vocabulary='any', for a model that is to learn other tokens",
        )

    def read(self, wanted: Mapping[str, tuple[int, ...]]) -> Weights:
        """Returns the contents of the checkpoint under the model's paths; most are read later.

        Args:
            wanted: the model's shapes, by path.

        Raises:
            UserError: if there is no such checkpoint or member, or a pattern of `rename` has no
                effect.
        """
        leaves = open_tree(self.path, self.step)
        if self.layout == 'torch':
            return self.from_torch(subtree(leaves, self.at), wanted)
        weights = flax_layout.variables(leaves, at=self.at, ema=self.ema)
        if self.optimizer:
            state = subtree(leaves, self.at)
            key_paths = [key_path(path) for path in weights if path.startswith('params/')]
            opt_state = flax_layout.optimizer_state(state, key_paths)
            weights.update(lib.slots(opt_state, key_paths) or flax_optim.slots(state, wanted))
        # Before `rename`, whose patterns are written for the names of Linen.
        if self.layout == 'pre_linen':
            weights = pre_linen.convert(weights)
        if self.member is not None:
            weights = _select_member(weights, self.member)
        # By key path, so that a parameter and its slots get the same new name.
        names = self._rename(filter(None, dict.fromkeys(map(key_path, weights))))
        return {
            lib.with_key_path(path, names.get(key_path(path), '')): x for path, x in weights.items()
        }

    def from_torch(self, leaves: Leaves, wanted: Mapping[str, tuple[int, ...]]) -> Weights:
        """Returns the weights of a PyTorch model, as `read` does.

        Args:
            leaves: the tensors, by the parts of their names.
            wanted: the model's shapes, by path.
        """
        tensors = lib.read_arrays({'/'.join(keys): leaf for keys, leaf in leaves.items()})
        names = self._rename(tensors)
        arrays = {names[name]: array for name, array in tensors.items()}
        weights, used = torch_layout.convert(
            arrays, wanted, flatten=self.flatten, where=f'{self.where}flatten'
        )
        # Unused tensors too, so that messages list them: a rename may have missed them.
        rest = {f'{TENSORS}{n}': lib.HostLeaf(x) for n, x in arrays.items() if n not in used}
        return {**weights, **rest}

    def selects(self, path: str) -> bool:
        """Whether to load the array with this path in the model."""
        where = key_path(path) or path
        # `include` names variables; a count beside the slots ('opt_state.0.count') has no key path.
        included = not self.include or patterns.matches(self.include, where) or lib.is_slot(where)
        return included and not patterns.matches(self.exclude, where)

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Raises a UserError for a pattern that matches nothing in the model."""
        key_paths = list(dict.fromkeys(map(key_path, paths)))
        for name in ('include', 'exclude'):
            patterns.check_used(
                getattr(self, name), key_paths, f'{self.where}{name}', 'nothing in the model'
            )

    def _rename(self, paths: Iterable[str]) -> dict[str, str]:
        """Returns the key path in the model for each key path in the checkpoint."""
        names = {path: path for path in paths}
        for pattern, replacement in self.rename:
            try:
                new = {old: re.sub(pattern, replacement, path) for old, path in names.items()}
            except (re.error, IndexError) as error:
                raise UserError(f'{self.where}rename: {replacement!r}: {error}') from error
            if new == names:
                raise UserError(
                    f'{self.where}rename: the pattern {pattern!r} changes no path of the '
                    f'checkpoint, which are\n{indented_list(names.values())}'
                )
            names = new
        new_paths = list(names.values())
        if twice := sorted(path for path in set(new_paths) if new_paths.count(path) > 1):
            raise UserError(
                f'{self.where}rename: several arrays get the path\n{indented_list(twice)}'
            )
        return names


def _select_member(weights: Weights, member: int) -> Weights:
    """Returns the weights of one member of an ensemble; those of all members are read."""
    shapes = [leaf.shape for leaf in weights.values()]
    sizes = {shape[0] if shape else None for shape in shapes}
    size = sizes.pop()
    if sizes or size is None:
        raise UserError(f'{WHERE}.member: the checkpoint is not one of an ensemble')
    if not 0 <= member < size:
        raise UserError(f'{WHERE}.member: the ensemble has the members 0 to {size - 1}')
    return {path: lib.HostLeaf(array[member]) for path, array in lib.read_arrays(weights).items()}
