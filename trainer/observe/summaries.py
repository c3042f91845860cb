# SPDX-License-Identifier: Apache-2.0
"""Summaries: texts, images, histograms and figures, in files and for TensorBoard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from trainer.config import files
from trainer.config.errors import UserError
from trainer.modules.shapes import describe
from trainer.observe.npz import write_npz


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, such as samples of a language model.

    Attributes:
        texts: the texts, in the order in which they are shown.
    """

    texts: tuple[str, ...]

    def __init__(self, texts: str | Sequence[str]):
        """Takes one text or several."""
        given = (texts,) if isinstance(texts, str) else tuple(texts)
        if not all(isinstance(text, str) for text in given):
            kinds = ', '.join(sorted({type(text).__name__ for text in given}))
            raise UserError(f'Texts: expected text or a list of texts, got items of {kinds}')
        object.__setattr__(self, 'texts', given)

    def write(self, stem: epath.Path) -> epath.Path:
        """Writes `<stem>.txt`, the texts separated by a line of dashes, and returns its path."""
        path = _with_suffix(stem, '.txt')
        text = ('\n' + '-' * 8 + '\n').join(self.texts)
        # Generated text may have half of a character.
        files.replace(path, text.encode(errors='backslashreplace') + b'\n')
        return path


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of equal size, shown as one grid.

    Attributes:
        images: uint8 (n, height, width, channels), with 1, 3 or 4 channels.
        columns: images in a row of the grid.
    """

    images: np.ndarray
    columns: int

    def __new__(cls, images: Any = None, columns: int | None = None) -> Any:
        """Returns a `Traced` within a compiled function."""
        return _create(cls, images, columns=columns)

    def __init__(self, images: Any, columns: int | None = None):
        """Takes images of bytes from 0 to 255, or of floats from 0 to 1.

        Args:
            images: (height, width), (n, height, width) or (n, height, width, channels).
            columns: images in a row; by default as many rows as columns.

        Raises:
            UserError: for another shape or dtype.
        """
        array = np.asarray(images)
        shape = describe(array)
        if array.ndim == 2:
            array = array[None]
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or not array.size:
            raise UserError(
                'Images: expected (n, height, width, channels) with 1, 3 or 4 channels, got '
                f'{shape}'
            )
        if array.dtype != np.uint8:
            # By name: bfloat16 is none of numpy's floats.
            if 'float' not in array.dtype.name and array.dtype != bool:
                raise UserError(
                    'Images: expected uint8 values from 0 to 255, or floats from 0 to 1, got '
                    f'{shape}'
                )
            # A generated image may be slightly out of range, which is not a reason to end a run.
            clipped = np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1)
            array = np.round(clipped * 255).astype(np.uint8)
        object.__setattr__(self, 'images', array)
        object.__setattr__(self, 'columns', columns or math.ceil(math.sqrt(len(array))))

    def grid(self) -> np.ndarray:
        """Returns the grid, uint8 (height, width, channels); a place without an image is black."""
        count, height, width, channels = self.images.shape
        rows = -(-count // self.columns)
        full = np.zeros((rows * self.columns, height, width, channels), np.uint8)
        full[:count] = self.images
        # A grid without a loop: rows of images become rows of pixels when the two middle dimensions
        # are swapped.
        parts = full.reshape(rows, self.columns, height, width, channels)
        return parts.swapaxes(1, 2).reshape(rows * height, self.columns * width, channels)

    def png(self) -> bytes:
        """Returns the grid as a PNG file."""
        from PIL import Image  # Runs without images need not load it.

        grid, content = self.grid(), io.BytesIO()
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(content, 'PNG')
        return content.getvalue()

    def write(self, stem: epath.Path) -> epath.Path:
        """Writes `<stem>.png` and returns its path."""
        path = _with_suffix(stem, '.png')
        files.replace(path, self.png())
        return path


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A histogram of the finite values of an array.

    Attributes:
        low: the smallest value.
        high: the largest value.
        counts: number of values in bins of equal width from `low` to `high`, (bins,). If all values
            are equal, they are in the first bin.
        mean: mean of the values.
        std: their standard deviation.
    """

    low: float
    high: float
    counts: np.ndarray
    mean: float
    std: float

    def __new__(cls, values: Any = None, bins: int = 30) -> Any:
        """Returns a `Traced` within a compiled function."""
        return _create(cls, values, bins=bins)

    def __init__(self, values: Any, bins: int = 30):
        """Counts values.

        Args:
            values: numbers, an array of any shape. Those that are not finite are left out.
            bins: number of bins.

        Raises:
            UserError: for values that are not real numbers.
        """
        array = np.asarray(values)
        # By name: bfloat16 is none of numpy's floats.
        if not any(kind in array.dtype.name for kind in ('float', 'int', 'bool')):
            raise UserError(f'Histogram: expected an array of real numbers, got {describe(array)}')
        numbers = array.astype(np.float64).ravel()
        finite = numbers[np.isfinite(numbers)]
        if not finite.size:
            self._set(0.0, 0.0, np.zeros(bins), 0.0, 0.0)
            return
        low, high = float(finite.min()), float(finite.max())
        counts = np.zeros(bins)
        if low < high:
            counts, _ = np.histogram(finite, bins, (low, high))
        else:
            counts[0] = finite.size
        self._set(low, high, counts, float(finite.mean()), float(finite.std()))

    @classmethod
    def from_counts(
        cls, counts: np.ndarray, *, low: float, high: float, mean: float, std: float
    ) -> Histogram:
        """Returns a histogram that has been counted elsewhere, as on the devices."""
        histogram = object.__new__(cls)
        histogram._set(low, high, counts, mean, std)
        return histogram

    def _set(self, low: float, high: float, counts: np.ndarray, mean: float, std: float) -> None:
        values = {'low': low, 'high': high, 'counts': counts, 'mean': mean, 'std': std}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def write(self, stem: epath.Path) -> epath.Path:
        """Writes `<stem>.npz` with `counts`, `edges` (bins + 1,), `mean` and `std`."""
        path = _with_suffix(stem, '.npz')
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        numbers = {'mean': np.asarray(self.mean), 'std': np.asarray(self.std)}
        write_npz(path, {'counts': np.asarray(self.counts), 'edges': edges, **numbers})
        return path


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays by name, for files only.

    Attributes:
        arrays: arrays of any shapes, by name.
    """

    arrays: Mapping[str, np.ndarray]

    def __new__(cls, arrays: Any = None) -> Any:
        """Returns a `Traced` within a compiled function."""
        return _create(cls, arrays)

    def write(self, stem: epath.Path) -> epath.Path:
        """Writes `<stem>.npz` and returns its path."""
        path = _with_suffix(stem, '.npz')
        write_npz(path, self.arrays)
        return path


Summary = Texts | Images | Histogram | Arrays


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['arrays'], meta_fields=['kind', 'options']
)
@dataclasses.dataclass(frozen=True)
class Traced:
    """A summary whose arrays a compiled program computes: what `Images(x)` returns in a task.

    Attributes:
        arrays: the array of the summary, or its arrays by name.
        kind: class of the summary.
        options: its further arguments.
    """

    arrays: Any
    kind: type
    options: tuple[tuple[str, Any], ...] = ()

    def create(self, select: Callable[[Any], np.ndarray]) -> Summary:
        """Returns the summary, with a function applied to each array."""
        summary: Summary = self.kind(jax.tree.map(select, self.arrays), **dict(self.options))
        return summary


def _create(cls: type, arrays: Any, **options: Any) -> Any:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        return Traced(arrays, cls, tuple(options.items()))
    return object.__new__(cls)


def with_summaries(name: str, value: Any) -> Any:
    """Returns a value with its texts, lists of text and matplotlib figures as summaries.

    A list of numbers or of equal arrays becomes an array, other values are returned as they are; of
    a dict, the entries are treated alike. An empty list is a list of no texts.

    Args:
        name: its name, for messages.
        value: what a score or a hook has returned under this name.

    Raises:
        UserError: for a value of another class.
    """
    if isinstance(value, Mapping):
        return {key: with_summaries(f'{name}/{key}', each) for key, each in value.items()}
    if isinstance(value, str):
        return Texts(value)
    if isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value):
        return Texts(value)
    if isinstance(value, (list, tuple)):
        # Lists of different lengths are no array; of other objects, numpy makes one of objects.
        with contextlib.suppress(ValueError):
            array = np.asarray(value)
            if array.dtype.kind not in 'OUS':
                return array
    # matplotlib is not imported: a value can be one of its figures only if the user has done so.
    if callable(getattr(value, 'savefig', None)):
        return image_of_figure(value)
    if isinstance(value, (numbers.Number, np.ndarray, np.generic, jax.Array, Summary)):
        return value
    if hasattr(value, '__array__'):  # Of another library, such as PyTorch.
        return np.asarray(value)
    raise UserError(
        f'the value {name!r} is a {type(value).__name__}; expected a number, an array, text, a '
        'summary of `trainer.summaries`, a matplotlib figure, or a dict of these'
    )


def image_of_figure(figure: Any) -> Images:
    """Returns a matplotlib figure as an image, at the figure's own resolution."""
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format='png', dpi='figure')
    return Images(np.asarray(Image.open(content).convert('RGB'))[None])


def _with_suffix(stem: epath.Path, suffix: str) -> epath.Path:
    # Not `with_suffix`, which would replace what follows a dot in a name.
    return stem.parent / (stem.name + suffix)
