# SPDX-License-Identifier: Apache-2.0
"""ArrayRecord files: records of any kind, read in any order."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .compat import record_place
from .sources import RandomAccessSource


class ArrayRecord(RandomAccessSource):
    """The records of ArrayRecord files, in the order of the files."""

    def __init__(self, path: str | Sequence[str], *, decode: Callable[[bytes], Mapping[str, Any]]):
        """Opens the files; no record is read but the first.

        Args:
            path: a file, a pattern such as 'train/*.array_record', or several of these. The files
                of a pattern stand in the order of their names.
            decode: makes a dict of arrays of a record's bytes; of equal shapes for all records.

        Raises:
            ValueError: if there is no such file, one is no ArrayRecord, there is no record, or the
                first one is damaged.
        """
        paths = [path] if isinstance(path, str) else list(path)
        files = [file for one in paths for file in _matching(os.path.expanduser(one))]
        self._files = files
        records = _open(files)
        try:
            super().__init__(_Decoded(records, decode))
        except RuntimeError as error:  # The library's word for a damaged record.
            raise ValueError(f'{error}, while reading {self.describe(0)}') from error
        except Exception as error:
            if len(records):
                error.add_note(f'while reading {self.describe(0)}')
            raise

    def describe(self, index: int) -> str:
        """Returns what messages call a record: by its file, and its place in it."""
        file, place = record_place(self._items.records, index)
        return f'record {place} of {self._files[file]}'


class _Decoded:
    """Records as examples."""

    def __init__(self, records: Any, decode: Callable[[bytes], Mapping[str, Any]]):
        self.records = records
        self._decode = decode

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._decode(self.records[index])

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        return [self._decode(record) for record in self.records.__getitems__(indices)]


def _open(files: list[str]) -> Any:
    import grain.python as grain

    try:
        return grain.ArrayRecordDataSource(files)
    except (ValueError, RuntimeError, OSError) as error:
        if len(files) == 1:
            raise ValueError(f'path: {files[0]} is no ArrayRecord file: {error}') from error
        for file in files:
            _open([file])
        raise


def _matching(path: str) -> list[str]:
    if os.path.isfile(path):  # Its name may have brackets.
        return [path]
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(
            f'path: {path!r} is no file and matches none; relative to {os.getcwd()}. The files of '
            "a directory are written 'directory/*.array_record'"
        )
    return files
