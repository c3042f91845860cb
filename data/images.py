# SPDX-License-Identifier: Apache-2.0
"""Image files: a folder with a directory for each class, and a transform that decodes and crops.

The source returns paths, because images differ in size. `Decode` reads the files, in the threads or
processes of `GrainLoader`, so that its random crops follow from seed, epoch and example.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .image_codec import Box, central_box, check_installed, crop_and_resize, random_box
from .nested import Tree, get_field, with_field
from .rng import ExampleRng
from .sources import Arrays, ArraySpec

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
# Of a random crop, as many proposals as in the Inception papers and torchvision.
_TRIES = 10


class ImageFolder:
    """The image files of a directory that has a directory for each class, in the order of names.

    Fields: `path` text; `label` int32 (), the index of the class.

    Attributes:
        classes: names of the classes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        files: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | None = None,
        like: str | os.PathLike[str] | None = None,
        limit: int | None = None,
    ):
        """Lists the files, without reading them.

        Args:
            path: the directory, which contains CLASS/NAME.jpg, or CLASS/ANY/NAME.jpg.
            files: a text file with the files of a split, one a line, relative to `path`; by
                default all of the directory.
            classes: names of the classes, in the order of the labels; by default all directories,
                sorted by name.
            like: a directory with the same classes, for a split in a directory of its own: that of
                the training split, so that both have the same labels.
            limit: use only this many files from the start.

        Raises:
            ValueError: if a directory, a class or a file does not exist, there are no images, or
                the classes are not those of `like`.
        """
        if like is not None and classes is not None:
            raise ValueError('classes, like: expected at most one of them')
        root = os.path.expanduser(path)
        found = _list_classes(root, 'path')
        if like is not None:
            classes = _list_classes(os.path.expanduser(like), 'like')
            if more := sorted(set(found) - set(classes)):
                raise ValueError(f'like: {root} has {", ".join(more)}, which {like} does not have')
        self.classes = tuple(found if classes is None else classes)
        if missing := sorted(set(self.classes) - set(found)):
            raise ValueError(
                f'classes: {root} has no directory {", ".join(missing)}; create an empty one if it '
                'has no images of a class'
            )
        self._root = root
        names = self._walk() if files is None else self._read_list(os.path.expanduser(files))
        if limit is not None and limit < 1:
            raise ValueError(f'limit: {limit} files; expected a positive number, or None for all')
        self._names = names[:limit]
        if not self._names:
            raise ValueError(
                f'path: there are no images in the directories of {root}; expected '
                f'CLASS/NAME{_SUFFIXES[0]}, also in further directories below CLASS. Known '
                f'suffixes: {", ".join(_SUFFIXES)}'
            )
        label = {name: i for i, name in enumerate(self.classes)}
        self._labels = np.array([label[_class_of(name)] for name in self._names], np.int32)
        longest = len(self._root) + 1 + max(map(len, self._names))
        self._text = np.dtype(f'U{longest}')

    def _walk(self) -> list[str]:
        names = []
        for label in self.classes:
            for directory, below, files in os.walk(os.path.join(self._root, label)):
                below.sort()
                relative = os.path.relpath(directory, self._root)
                names += [f'{relative}/{file}' for file in sorted(files) if _has_image_suffix(file)]
        return names

    def _read_list(self, path: str) -> list[str]:
        with open(path, encoding='utf-8') as lines:
            names = [line.strip() for line in lines if line.strip()]
        for name in names:
            if _class_of(name) not in self.classes:
                raise ValueError(
                    f'files: {path} lists {name!r}; expected CLASS/NAME, and the classes are '
                    f'{", ".join(self.classes)}'
                )
            if not os.path.isfile(os.path.join(self._root, name)):
                raise ValueError(f'files: {path} lists {name!r}, which {self._root} does not have')
        return names

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {'path': ArraySpec((), self._text), 'label': ArraySpec((), self._labels.dtype)}

    def __len__(self) -> int:
        return len(self._names)

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns paths and labels of the examples at `indices` (n,)."""
        paths = [os.path.join(self._root, self._names[i]) for i in indices.tolist()]
        return {'path': np.array(paths, self._text), 'label': self._labels[indices]}

    def describe(self, index: int) -> str:
        """Returns the path of an example, for messages."""
        return os.path.join(self._root, self._names[index])


def _list_classes(root: str, argument: str) -> list[str]:
    if not os.path.isdir(root):
        raise ValueError(f'{argument}: there is no directory {root}, relative to {os.getcwd()}')
    return sorted(entry.name for entry in os.scandir(root) if _is_directory(entry))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith('.')


def _has_image_suffix(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith('.')


def _class_of(name: str) -> str:
    return name.partition('/')[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decodes images of any size, and crops and resizes them to one: uint8 (n, size, size, c).

    A random crop has a share of the image's area within `area` and an aspect ratio within `ratio`,
    as for the Inception networks. A central crop is the largest square, without a margin. JPEG,
    PNG and the other formats of OpenCV, of 8 bits; transparency is left out, and the orientation in
    the metadata of a photograph is not applied. Needs the extra `[images]`.

    Attributes:
        size: height and width of the results.
        crop: 'random' or 'center'.
        key: the field with paths (text) or the contents of files (bytes); it is kept.
        to: the field of the results.
        channels: 3 for RGB, or 1 for grey.
        area: smallest and largest share of the area in a random crop.
        ratio: smallest and largest quotient of width and height of a random crop.
        center: side of the central square, as a share of the image's shorter side.
    """

    size: int
    crop: str
    key: str = 'path'
    to: str = 'image'
    channels: int = 3
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    center: float = 0.875

    def __post_init__(self) -> None:
        if self.crop not in ('random', 'center'):
            raise ValueError(f"crop: expected 'random' or 'center', got {self.crop!r}")
        if self.channels not in (1, 3):
            raise ValueError(f'channels: expected 3 for RGB or 1 for grey, got {self.channels}')
        for name in ('area', 'ratio'):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == 'area' and high > 1):
                raise ValueError(f'{name}: expected (smallest, largest), got {(low, high)}')
        if self.size < 1 or not 0 < self.center <= 1:
            raise ValueError(
                'size: expected a positive number of pixels; center: a share from above 0 to 1; '
                f'got {self.size} and {self.center}'
            )
        check_installed()

    def __call__(self, batch: Tree, rng: ExampleRng) -> Tree:
        """Returns the batch with the decoded images."""
        files = get_field(batch, self.key)
        images = np.empty((len(files), self.size, self.size, self.channels), np.uint8)
        draws = rng.uniform((_TRIES, 4)) if self.crop == 'random' else None
        box: Callable[[int, int], Box] = functools.partial(central_box, share=self.center)
        for i, file in enumerate(files.tolist()):
            if draws is not None:
                box = functools.partial(
                    random_box, draws=draws[i], area=self.area, ratio=self.ratio
                )
            crop_and_resize(_content(file), box, images[i])
        return with_field(batch, self.to, images)


def _content(file: Any) -> bytes:
    """Returns the content of a file that is given by its path, or already read."""
    if isinstance(file, bytes):
        return file
    with open(file, 'rb') as opened:
        return opened.read()
