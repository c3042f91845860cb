# SPDX-License-Identifier: Apache-2.0
"""Hugging Face datasets: a random-access source, and a stream."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import columns
from .sources import Arrays, ArraySpec


class HuggingFace:
    """A split of a Hugging Face dataset, as numpy arrays.

    The dtype of a field depends on the column type only: docs/howto/data.md has a list.
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
        """Opens the split, and checks for missing values and lists of different lengths.

        Args:
            path: a directory written by `save_to_disk`, or an argument of
                `datasets.load_dataset`: a name, or 'parquet', 'json', 'csv', 'imagefolder' with
                `data_files` or `data_dir`.
            split: 'train', 'test[:10%]', ...
            keys: fields to read; by default all. The fields of a struct are named 'column.field'.
            name: configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.
            data_dir: directory of the files.

        Raises:
            ValueError: if the package is not installed, the dataset, split or field does not exist,
                or a column cannot be converted to numpy arrays.
        """
        files = {'data_files': data_files, 'data_dir': data_dir}
        items = _load(path, name=name, split=split, streaming=False, **files)
        every = columns.from_schema(items.features.arrow_schema, items.features)
        self._columns = columns.select(every, keys)
        names = list(dict.fromkeys(column.top for column in self._columns))
        # Columns that are not read are not loaded from disk either.
        self._items = items.select_columns(names).with_format('arrow')
        if not len(items):
            raise ValueError('the source is empty')
        # If the table has more rows than the split (a slice such as 'train[:10%]'), a check of
        # whole columns would cover rows of other splits.
        table = self._items.data
        checked = self._columns if table.num_rows == len(items) else ()
        problems = [columns.check(c, table.column(c.top), self._columns) for c in checked]
        self._ragged_problem = next(filter(None, problems), None)
        # One real example for the spec: the shape of an image is known only once it is decoded.
        self._first = self[0]

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example.

        Raises:
            ValueError: if the lists of a column differ in length; `source[index]` still reads them.
        """
        if self._ragged_problem:
            raise ValueError(self._ragged_problem)
        return {name: ArraySpec(x.shape, x.dtype) for name, x in self._first.items()}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Arrays:
        """Returns one example; examples may differ in shape."""
        return _squeeze_row(self._read([index]))

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
            # The dtype of text includes the length of the longest one, which may differ.
            first, is_text = spec[name], x.dtype.kind == 'U'
            if x.shape[1:] != first.shape or not (is_text or x.dtype == first.dtype):
                raise ValueError(
                    f'{name!r} is {x.dtype} {x.shape[1:]}, but in example 0 it is {first.dtype} '
                    f'{first.shape}; a batch needs one shape and dtype: resize, crop or pad with '
                    'Dataset.map and save_to_disk, or leave the field out of `keys`'
                )
        return arrays

    def _read(self, indices: list[int]) -> Arrays:
        table = self._items[indices]
        return {c.name: columns.to_numpy(c, table.column(c.top)) for c in self._columns}


class HuggingFaceStream:
    """A Hugging Face dataset read as a stream, as by `load_dataset(streaming=True)`.

    For the loaders of `trainer.data.streaming`. Each process reads its own files, so there must be
    at least as many files as processes. Every pass reads the files in the same order.
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
            path: an argument of `datasets.load_dataset`: a name, or 'parquet', 'json', 'csv',
                'imagefolder' with `data_files` or `data_dir`.
            split: 'train', ...
            keys: fields to read; by default all. The fields of a struct are named 'column.field'.
            name: configuration of the dataset.
            data_files: files, patterns, or a dict of these by split.
            data_dir: directory of the files.

        Raises:
            ValueError: if the package is not installed, the dataset, split or field does not exist,
                or a column cannot be converted to numpy arrays.
        """
        files = {'data_files': data_files, 'data_dir': data_dir}
        items = _load(path, name=name, split=split, streaming=True, **files)
        self._keys = keys
        if items.features is not None:  # Otherwise the columns are known from the first example.
            every = columns.from_schema(items.features.arrow_schema, items.features)
            selected = columns.select(every, keys)
            items = items.select_columns(list(dict.fromkeys(column.top for column in selected)))
        self._items = items.with_format('arrow')

    def shard(self, index: int, count: int) -> Any:
        """Returns the files of reader `index` of `count`.

        Raises:
            ValueError: if there are fewer files than readers.
        """
        files = self._items.num_shards
        if files < count:
            raise ValueError(
                f'data_files: {count} processes need at least {count} files, and there are '
                f'{files}; split the files, or use trainer.data.hf:HuggingFace'
            )
        return _Part(self._items, self._keys, index, count)


class _Part:
    def __init__(self, items: Any, keys: Sequence[str] | None, index: int, count: int):
        self._args = items, keys, index, count

    def __iter__(self) -> _PartIterator:
        items, keys, index, count = self._args
        # A new object for each iterator: a dataset stores its own read position.
        return _PartIterator(items.shard(num_shards=count, index=index), keys)


class _PartIterator:
    def __init__(self, items: Any, keys: Sequence[str] | None):
        self._items = items
        self._keys = keys
        self._schema: Any = None
        self._columns: list[columns.Column] = []
        self._examples = iter(items)
        self._started = False

    def __iter__(self) -> _PartIterator:
        return self

    def __next__(self) -> Any:
        self._started = True
        table = next(self._examples)
        if self._schema is None or not table.schema.equals(self._schema):
            # The blocks of a JSON file may differ in their types.
            self._schema = table.schema
            self._columns = columns.select(
                columns.from_schema(table.schema, self._items.features), self._keys
            )
        return _squeeze_row(
            {c.name: columns.to_numpy(c, table.column(c.top)) for c in self._columns}
        )

    def get_state(self) -> Any:
        # None for the beginning, where there is nothing to restore.
        return self._items.state_dict() if self._started else None

    def set_state(self, state: Any) -> None:
        if state is not None:
            self._items.load_state_dict(state)
        self._started = state is not None
        # The position applies to new iterators only.
        self._examples = iter(self._items)


def _load(path: str, *, split: str | None, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "the Hugging Face package 'datasets' is not installed: "
            "pip install 'jax-config-trainer[hf]'"
        ) from error
    path = os.path.expanduser(path)
    if options.get('data_files') is not None:
        options['data_files'] = _expand_user(options['data_files'])
    saved = os.path.join(path, 'dataset_info.json'), os.path.join(path, 'dataset_dict.json')
    try:
        # `load_dataset` refuses a directory that `save_to_disk` has written.
        if any(map(os.path.exists, saved)):
            dataset = datasets.load_from_disk(path)
            if split is not None and isinstance(dataset, dict):
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(path, split=split, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        NotImplementedError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise ValueError(
            f'path: cannot open {path!r}, split {split!r}: '
            + f'{type(error).__name__}: {error}'.splitlines()[0]
        ) from error
    if isinstance(dataset, dict):
        raise ValueError(f'split: expected one of {", ".join(dataset)}')
    return dataset


def _expand_user(files: Any) -> Any:
    """Returns a file name, or a sequence or dict of them, with '~' expanded."""
    if isinstance(files, Mapping):
        return {split: _expand_user(each) for split, each in files.items()}
    if isinstance(files, (list, tuple)):
        return [_expand_user(each) for each in files]
    return os.path.expanduser(files)


def _squeeze_row(arrays: Arrays) -> Arrays:
    """Returns the only row of each array, as an array also for text and bytes."""
    # Not `x[0]`: of a field without dimensions that is a scalar, and of bytes a Python object.
    return {name: x.reshape(x.shape[1:]) for name, x in arrays.items()}
