# SPDX-License-Identifier: Apache-2.0
"""Hugging Face datasets: those on the disk, by index, and those that are read from the front."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .sources import RandomAccessSource


class HuggingFace(RandomAccessSource):
    """A split of a Hugging Face dataset, as numpy arrays."""

    def __init__(
        self,
        path: str,
        *,
        split: str | None = None,
        keys: Sequence[str] | None = None,
        name: str | None = None,
        data_files: Any = None,
    ):
        """Opens the split.

        Args:
            path: a directory that `save_to_disk` has written; or what `datasets.load_dataset`
                takes: a name, or 'parquet', 'json', 'csv' with `data_files`.
            split: 'train', 'test[:10%]', ...
            keys: fields to read; by default all. All of them must be numbers or images.
            name: which configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.

        Raises:
            ValueError: if the package is missing, or there is no such dataset, split or field.
        """
        items = _load(path, name=name, data_files=data_files, split=split, streaming=False)
        super().__init__(_fields(items, keys).with_format('numpy'))


class HuggingFaceStream:
    """A Hugging Face dataset that is read from the front, as `load_dataset(streaming=True)` does.

    A stream for `data.streaming`; each of several processes reads its own files, so there must be
    as many. The order is that of the files in every pass.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str,
        keys: Sequence[str] | None = None,
        name: str | None = None,
        data_files: Any = None,
    ):
        """Opens the split.

        Args:
            path: what `datasets.load_dataset` takes: a name, or 'parquet', 'json', 'csv' with
                `data_files`.
            split: 'train', ...
            keys: fields to read; by default all.
            name: which configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.

        Raises:
            ValueError: if the package is missing, or there is no such dataset, split or field.
        """
        items = _load(path, name=name, data_files=data_files, split=split, streaming=True)
        self._items = _fields(items, keys).with_format('numpy')

    def shard(self, index: int, count: int) -> Any:
        """Returns the files of reader `index` of `count`.

        Raises:
            ValueError: if there are fewer files than readers.
        """
        files = self._items.num_shards
        if files < count:
            raise ValueError(
                f'data_files: {count} processes read files of their own, and there are {files}; '
                'split them up, or use data.hf:HuggingFace'
            )
        return _Part(self._items, index, count)


class _Part:
    def __init__(self, items: Any, index: int, count: int):
        self._all = items, index, count

    def __iter__(self) -> _Place:
        items, index, count = self._all
        # An object of its own, for a dataset counts in itself how far it was read.
        return _Place(items.shard(num_shards=count, index=index))


class _Place:
    def __init__(self, items: Any):
        self._items = items
        self._examples = iter(items)
        self._started = False

    def __iter__(self) -> _Place:
        return self

    def __next__(self) -> Any:
        self._started = True
        return next(self._examples)

    def get_state(self) -> Any:
        return self._items.state_dict() if self._started else None

    def set_state(self, state: Any) -> None:
        if state is not None:
            self._items.load_state_dict(state)
        self._started = state is not None
        self._examples = iter(self._items)


def _load(path: str, *, split: str | None, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "the package 'datasets' of Hugging Face is not installed: "
            "pip install 'jax-config-trainer[hf]'"
        ) from error
    path = os.path.expanduser(path)
    if options.get('data_files') is not None:
        options['data_files'] = _expanded(options['data_files'])
    saved = os.path.join(path, 'dataset_info.json'), os.path.join(path, 'dataset_dict.json')
    try:
        if any(map(os.path.exists, saved)):
            found = datasets.load_from_disk(path)
            found = found[split] if split is not None and isinstance(found, dict) else found
        else:
            found = datasets.load_dataset(path, split=split, **options)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f'path: {path!r}, split {split!r} cannot be opened: '
            + f'{type(error).__name__}: {error}'.splitlines()[0]
        ) from error
    if isinstance(found, dict):
        raise ValueError(f'split: name one of {", ".join(found)}')
    return found


def _expanded(files: Any) -> Any:
    """Returns file names, a sequence or a dict of them, with the home directory for '~'."""
    if isinstance(files, Mapping):
        return {split: _expanded(each) for split, each in files.items()}
    if isinstance(files, (list, tuple)):
        return [_expanded(each) for each in files]
    return os.path.expanduser(files)


def _fields(items: Any, keys: Sequence[str] | None) -> Any:
    if keys is None:
        return items
    unknown = sorted(set(keys) - set(items.column_names))
    if unknown:
        raise ValueError(f'keys: {unknown} are none of {", ".join(items.column_names)}')
    return items.select_columns(list(keys))
