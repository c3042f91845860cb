# SPDX-License-Identifier: Apache-2.0
"""`config.init_from`: what of which checkpoint a run starts with, under the names of its model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from trainer.config import patterns
from trainer.config.errors import UserError, short_repr
from trainer.config.text import indented_list
from trainer.weights import flax_layout, flax_optim, pre_linen, torch_layout
from trainer.weights import leaves as lib
from trainer.weights.leaves import Weights, place
from trainer.weights.read import Leaves, below, open_tree

WHERE = 'config.init_from'
_PAIRS = {
    'rename': '(pattern, replacement) pairs',
    'flatten': '(pattern, (channels, height, width)) pairs',
}
# The collection of PyTorch's tensors that make nothing.
TENSORS = 'torch/'


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Where a run's first weights come from. Patterns match whole paths of this model.

    A path is that of a parameter or of another variable, such as 'Dense_0/kernel'.

    Attributes:
        path: file or directory; see `trainer.weights.read.open_tree`.
        step: which of several checkpoints: 'latest', 'best' or a number.
        at: where in the checkpoint the state, the variables or the bare parameters are.
        layout: who wrote it: Flax, Flax before Linen, or PyTorch.
        member: of an ensemble's checkpoint, which of its members.
        include: patterns of what is loaded; empty for everything.
        exclude: patterns of what keeps its fresh values although it is included.
        rename: (pattern, replacement) pairs, applied in order to the paths of the checkpoint, as
            `re.sub` does: a pattern may match a part of the path.
        flatten: of PyTorch: see `trainer.weights.torch_layout.convert`.
        on_missing: what becomes of what the checkpoint lacks: an error, or its fresh value.
        ema: load the moving average of that run in place of its parameters.
        optimizer: load what the optimizer holds for the parameters too, such as Adam's moments.
        where: what stands before the name of one of these in messages.
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
    where: str = f'{WHERE}.'

    def __post_init__(self) -> None:
        """Raises a UserError for a pattern that is none, and for keys that do not go together."""
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
                f"{self.where}flatten is of PyTorch: set {self.where}layout='torch' too"
            )
        for name, layouts in (('ema', ('flax',)), ('optimizer', ('flax', 'pre_linen'))):
            if getattr(self, name) and self.layout not in layouts:
                raise UserError(f'{self.where}{name}: layout={self.layout!r} has none')
        if self.layout != 'flax' and self.member is not None:
            raise UserError(f'{self.where}member: layout={self.layout!r} has no ensembles')

    @property
    def in_config(self) -> bool:
        """Whether these are keys of a config, rather than arguments of a function."""
        return self.where == f'{WHERE}.'

    @property
    def title(self) -> str:
        """What messages begin with that name no key."""
        return f'{WHERE}: ' if self.in_config else ''

    def read(self, wanted: Mapping[str, tuple[int, ...]]) -> Weights:
        """Returns what the checkpoint holds, under the paths of the model; nothing is loaded yet.

        Args:
            wanted: the model's shapes, by path.

        Raises:
            UserError: if there is no such checkpoint or member, or a rename changes nothing.
        """
        leaves = open_tree(self.path, self.step)
        if self.layout == 'torch':
            return self.from_torch(below(leaves, self.at), wanted)
        found = flax_layout.variables(leaves, at=self.at, ema=self.ema)
        if self.optimizer:
            state = below(leaves, self.at)
            places = [place(path) for path in found if path.startswith('params/')]
            held = flax_layout.optimizer_state(state, places)
            found.update(lib.slots(held, places) or flax_optim.slots(state, wanted))
        if self.layout == 'pre_linen':
            found = pre_linen.convert(found)
        if self.member is not None:
            found = _member(found, self.member)
        names = self._names(filter(None, dict.fromkeys(map(place, found))))
        return {lib.replace_place(path, names.get(place(path), '')): x for path, x in found.items()}

    def from_torch(self, leaves: Leaves, wanted: Mapping[str, tuple[int, ...]]) -> Weights:
        """Returns the tensors of PyTorch as `read` does."""
        tensors = lib.hosts({'/'.join(keys): leaf for keys, leaf in leaves.items()})
        names = self._names(tensors)
        arrays = {names[name]: array for name, array in tensors.items()}
        found, used = torch_layout.convert(
            arrays, wanted, flatten=self.flatten, where=f'{self.where}flatten'
        )
        # What makes nothing is told beside what is found: it may be what a rename has missed.
        rest = {f'{TENSORS}{n}': lib.HostLeaf(x) for n, x in arrays.items() if n not in used}
        return {**found, **rest}

    def chosen(self, path: str) -> bool:
        """Whether what has this path in the model is loaded."""
        where = place(path) or path
        included = not self.include or patterns.matches(self.include, where) or lib.is_slot(where)
        return included and not patterns.matches(self.exclude, where)

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Raises a UserError for a pattern that matches nothing in the model."""
        places = list(dict.fromkeys(map(place, paths)))
        for name in ('include', 'exclude'):
            patterns.check_used(
                getattr(self, name), places, f'{self.where}{name}', 'nothing in the model'
            )

    def _names(self, paths: Iterable[str]) -> dict[str, str]:
        """Returns the path in the model for each in the checkpoint."""
        names = {path: path for path in paths}
        for pattern, replacement in self.rename:
            try:
                new = {old: re.sub(pattern, replacement, path) for old, path in names.items()}
            except (re.error, IndexError) as error:
                raise UserError(f'{self.where}rename: {replacement!r}: {error}') from error
            if new == names:
                raise UserError(
                    f'{self.where}rename: the pattern {pattern!r} changes no path of the '
                    f'checkpoint. There is\n{indented_list(names.values())}'
                )
            names = new
        new_paths = list(names.values())
        if twice := sorted(path for path in set(new_paths) if new_paths.count(path) > 1):
            raise UserError(
                f'{self.where}rename: several arrays get the path\n{indented_list(twice)}'
            )
        return names


def _member(weights: Weights, member: int) -> Weights:
    """Returns one member's part of an ensemble's weights; the whole of them is read."""
    shapes = [leaf.shape for leaf in weights.values()]
    sizes = {shape[0] if shape else None for shape in shapes}
    size = sizes.pop()
    if sizes or size is None:
        raise UserError(f'{WHERE}.member: the checkpoint is not that of an ensemble')
    if not 0 <= member < size:
        raise UserError(f'{WHERE}.member: the ensemble has the members 0 to {size - 1}')
    return {path: lib.HostLeaf(array[member]) for path, array in lib.hosts(weights).items()}
