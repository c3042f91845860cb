# SPDX-License-Identifier: Apache-2.0
"""Transforms: callables on batches, `transform(batch)` or `transform(batch, rng)`.

A batch is a dict of arrays (n, ...), or another tree of them, as the source returns it, with any
number of rows: the loader calls a transform once for many steps. All randomness comes from `rng`,
so the result for an example does not depend on the batch or process in which it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from . import nested
from .nested import Tree, get_field, is_flat, keep_fields, with_field, without_field
from .per_example import PerExample as PerExample
from .rng import ExampleRng, wants_rng


def apply(
    transforms: Sequence[Callable[..., Tree]],
    batch: Tree,
    *,
    seed: int,
    epochs: np.ndarray,
    ids: np.ndarray,
) -> Tree:
    """Returns the batch after all transforms, in order.

    A transform may return anything with `__array__`, such as JAX arrays; it becomes a numpy array.
    An exception in a transform keeps its type and traceback, and gets a note with its name.

    Raises:
        TypeError: if a transform does not return a dict, or another tree, of arrays.
        ValueError: if a transform changes the number of rows.
    """
    for position, transform in enumerate(transforms):
        try:
            if wants_rng(transform):
                # The position in the list is part of the key, so that two equal transforms draw
                # different numbers.
                rng = ExampleRng(seed, position, epochs, ids)
                batch = transform(batch, rng)
            else:
                batch = transform(batch)
            batch = _to_numpy(batch, len(ids))
        except Exception as error:
            # A note, so that the error keeps its type and its traceback.
            error.add_note(f'in transforms[{position}] = {transform!r}')
            raise
    return batch


def _to_numpy(batch: Any, rows: int) -> Tree:
    """Returns the result of a transform with numpy arrays only, after checking it."""
    if not isinstance(batch, dict | list | tuple):
        raise TypeError(
            f'a transform must return a dict of arrays, got {type(batch)}; a batch may also be a '
            'tuple, a list or a NamedTuple'
        )

    def convert(name: str, x: Any) -> np.ndarray:
        if not isinstance(x, np.ndarray):
            if not hasattr(x, '__array__') or isinstance(x, np.generic):
                raise TypeError(f'{name!r} must be an array (rows, ...), got {type(x)}')
            # A copy: the memory of a JAX array cannot be written to, as the next transform may do.
            x = np.array(x)
        if x.shape[:1] != (rows,):
            raise ValueError(
                f'{name!r} has shape {x.shape} after a transform of {rows} rows; a transform '
                'must keep the number of rows. Filter examples in the source instead'
            )
        return x

    return nested.map_named(convert, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToFloat:
    """Scales an integer field to floating point; by default 0..255 to 0..1.

    Attributes:
        key: the field.
        scale: factor.
        dtype: dtype of the result.
    """

    key: str = 'image'
    scale: float = 1 / 255
    dtype: str = 'float32'

    def __call__(self, batch: Tree) -> Tree:
        """Returns the batch with the field scaled."""
        scaled = get_field(batch, self.key).astype(self.dtype)
        # In place, without a second array of this size.
        scaled *= np.dtype(self.dtype).type(self.scale)
        return with_field(batch, self.key, scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalize:
    """Subtracts a mean and divides by a standard deviation, broadcast over the last dimensions."""

    key: str = 'image'
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __call__(self, batch: Tree) -> Tree:
        """Returns the batch with the field normalised, float32."""
        normalised = get_field(batch, self.key).astype(np.float32)
        normalised -= np.asarray(self.mean, np.float32)
        normalised /= np.asarray(self.std, np.float32)
        return with_field(batch, self.key, normalised)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneHot:
    """Turns integer labels (n,) into float32 (n, num_classes)."""

    num_classes: int
    key: str = 'label'

    def __call__(self, batch: Tree) -> Tree:
        """Returns the batch with the field encoded."""
        eye = np.eye(self.num_classes, dtype=np.float32)
        return with_field(batch, self.key, eye[get_field(batch, self.key)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Keeps the named fields and removes the others."""

    keys: tuple[str, ...]

    def __call__(self, batch: Tree) -> Tree:
        """Returns the named fields."""
        return keep_fields(batch, self.keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Renames fields, `names` from old to new; the others stay."""

    names: Mapping[str, str]

    def __call__(self, batch: Tree) -> Tree:
        """Returns the batch with fields renamed."""
        if is_flat(batch):
            return {self.names.get(key, key): value for key, value in batch.items()}
        for old, new in self.names.items():
            batch = with_field(without_field(batch, old), new, get_field(batch, old))
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Shifts images (n, height, width, channels) by up to `padding` pixels, zeros moving in."""

    padding: int
    key: str = 'image'

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the field shifted."""
        images, pad = get_field(batch, self.key), self.padding
        n, height, width = images.shape[:3]
        # One gather with an index per example, instead of a loop over them.
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        top, left = rng.integers(0, 2 * pad + 1, (2,)).T
        rows = top[:, None] + np.arange(height)
        columns = left[:, None] + np.arange(width)
        cropped = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        return with_field(batch, self.key, cropped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFlip:
    """Mirrors each image (n, height, width, channels) with probability one half.

    Attributes:
        key: the field.
        axis: the dimension whose order is reversed: 'width' mirrors left to right, 'height' top to
            bottom.
    """

    key: str = 'image'
    axis: Literal['width', 'height'] = 'width'

    def __post_init__(self) -> None:
        if self.axis not in ('width', 'height'):
            raise ValueError(f"axis: expected 'width' or 'height', got {self.axis!r}")

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the field mirrored."""
        images = get_field(batch, self.key)
        # One draw per image, broadcast over its pixels.
        flip = (rng.uniform() < 0.5)[:, None, None, None]
        mirrored = images[:, :, ::-1] if self.axis == 'width' else images[:, ::-1]
        return with_field(batch, self.key, np.where(flip, mirrored, images))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binarize:
    """Draws each pixel of a grey image as 1 or 0, with its value / 255 as the probability of 1.

    An evaluation draws each example once for all runs, whatever their seed.

    Attributes:
        key: the field, uint8; the result has the same dtype.
        once: whether an example keeps its draw in all epochs of a training; otherwise each epoch
            draws again.
    """

    key: str = 'image'
    once: bool = False

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the field drawn."""
        if self.once:
            rng = dataclasses.replace(rng, epochs=np.zeros_like(rng.epochs))
        values = get_field(batch, self.key)
        if values.dtype != np.uint8:
            raise ValueError(
                f'{self.key!r} is {values.dtype}; expected uint8, values from 0 to 255. Binarize '
                'before other transforms'
            )
        drawn = rng.uniform(values.shape[1:]) * 255 < values
        return with_field(batch, self.key, drawn.astype(np.uint8))
