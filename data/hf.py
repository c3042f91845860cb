# SPDX-License-Identifier: Apache-2.0
"""Hugging Face datasets: those on the disk, by index, and those that are read from the front."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import columns
from .sources import Arrays, ArraySpec


class HuggingFace:
    """A split of a Hugging Face dataset, as numpy arrays.

    The type of a column decides on the dtype, as docs/howto/data.md lists.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str | None = None,
        keys: Sequence[str] | None = None,
        name: str | None = None,
        data_files: Any = None,
        data_dir: str | None = None,
    ):
        """Opens the split, and looks for missing values and for lists of several lengths.

        Args:
            path: a directory that `save_to_disk` has written; or what `datasets.load_dataset`
                takes: a name, or 'parquet', 'json', 'csv', 'imagefolder' with `data_files` or
                `data_dir`.
            split: 'train', 'test[:10%]', ...
            keys: fields to read; by default all. The fields of a struct are named 'column.field'.
            name: which configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.
            data_dir: directory of the files.

        Raises:
            ValueError: if the package is missing, if there is no such dataset, split or field, or
                if a column holds what numpy cannot.
        """
        files = {'data_files': data_files, 'data_dir': data_dir}
        items = _load(path, name=name, split=split, streaming=False, **files)
        every = columns.of_schema(items.features.arrow_schema, items.features)
        self._columns = columns.chosen(every, keys)
        names = list(dict.fromkeys(column.top for column in self._columns))
        self._items = items.select_columns(names).with_format('arrow')
        if not len(items):
            raise ValueError('the source is empty')
        # A table of more rows than the dataset has others than the split's.
        table = self._items.data
        checked = self._columns if table.num_rows == len(items) else ()
        found = [columns.check(c, table.column(c.top), self._columns) for c in checked]
        self._differs = next(filter(None, found), None)
        self._first = self[0]

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example.

        Raises:
            ValueError: if the lists of a column differ in length; `source[index]` still reads them.
        """
        if self._differs:
            raise ValueError(self._differs)
        return {name: ArraySpec(x.shape, x.dtype) for name, x in self._first.items()}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Arrays:
        """Returns one example; examples may differ in shape."""
        return _one(self._read([index]))

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the examples at `indices` (n,), stacked.

        Raises:
            ValueError: if an example has another shape or dtype than the first one.
        """
        spec = self.spec
        if not len(indices):
            return {name: np.zeros((0, *s.shape), s.dtype) for name, s in spec.items()}
        arrays = self._read(indices.tolist())
        for name, x in arrays.items():
            first, is_text = spec[name], x.dtype.kind == 'U'
            if x.shape[1:] != first.shape or not (is_text or x.dtype == first.dtype):
                raise ValueError(
                    f'{name!r} is {x.dtype} {x.shape[1:]}, of example 0 it is {first.dtype} '
                    f'{first.shape}; a batch needs one shape and dtype: resize, crop or pad with '
                    'Dataset.map and save_to_disk, or leave the field out of `keys`'
                )
        return arrays

    def _read(self, indices: list[int]) -> Arrays:
        table = self._items[indices]
        return {c.name: columns.to_numpy(c, table.column(c.top)) for c in self._columns}


class HuggingFaceStream:
    """A Hugging Face dataset that is read from the front, as `load_dataset(streaming=True)` does.

    A stream for `trainer.data.streaming`; each of several processes reads its own files, so there
    must be as many. The order is that of the files in every pass.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str,
        keys: Sequence[str] | None = None,
        name: str | None = None,
        data_files: Any = None,
        data_dir: str | None = None,
    ):
        """Opens the split.

        Args:
            path: what `datasets.load_dataset` takes: a name, or 'parquet', 'json', 'csv',
                'imagefolder' with `data_files` or `data_dir`.
            split: 'train', ...
            keys: fields to read; by default all. The fields of a struct are named 'column.field'.
            name: which configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.
            data_dir: directory of the files.

        Raises:
            ValueError: if the package is missing, if there is no such dataset, split or field, or
                if a column holds what numpy cannot.
        """
        files = {'data_files': data_files, 'data_dir': data_dir}
        items = _load(path, name=name, split=split, streaming=True, **files)
        self._keys = keys
        if items.features is not None:  # Otherwise its first example says what there is.
            every = columns.of_schema(items.features.arrow_schema, items.features)
            found = columns.chosen(every, keys)
            items = items.select_columns(list(dict.fromkeys(column.top for column in found)))
        self._items = items.with_format('arrow')

    def shard(self, index: int, count: int) -> Any:
        """Returns the files of reader `index` of `count`.

        Raises:
            ValueError: if there are fewer files than readers.
        """
        files = self._items.num_shards
        if files < count:
            raise ValueError(
                f'data_files: {count} processes read files of their own, and there are {files}; '
                'split them up, or use trainer.data.hf:HuggingFace'
            )
        return _Part(self._items, self._keys, index, count)


class _Part:
    def __init__(self, items: Any, keys: Sequence[str] | None, index: int, count: int):
        self._all = items, keys, index, count

    def __iter__(self) -> _Place:
        items, keys, index, count = self._all
        # An object of its own, for a dataset counts in itself how far it was read.
        return _Place(items.shard(num_shards=count, index=index), keys)


class _Place:
    def __init__(self, items: Any, keys: Sequence[str] | None):
        self._items = items
        self._keys = keys
        self._schema: Any = None
        self._columns: list[columns.Column] = []
        self._examples = iter(items)
        self._started = False

    def __iter__(self) -> _Place:
        return self

    def __next__(self) -> Any:
        self._started = True
        table = next(self._examples)
        if self._schema is None or not table.schema.equals(self._schema):
            # Each block of a JSON file has types of its own.
            self._schema = table.schema
            self._columns = columns.chosen(
                columns.of_schema(table.schema, self._items.features), self._keys
            )
        return _one({c.name: columns.to_numpy(c, table.column(c.top)) for c in self._columns})

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
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        NotImplementedError,
        datasets.exceptions.DatasetsError,
    ) as error:
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


def _one(arrays: Arrays) -> Arrays:
    """Returns the only row of each array, as an array even of text and bytes."""
    return {name: x.reshape(x.shape[1:]) for name, x in arrays.items()}
