# SPDX-License-Identifier: Apache-2.0
"""Source for ArrayRecord files: records of any kind with random access."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .compat import locate_record
from .sources import RandomAccessSource


class ArrayRecord(RandomAccessSource):
    """The records of ArrayRecord files, in the order of the files."""

    def __init__(self, path: str | Sequence[str], *, decode: Callable[[bytes], Mapping[str, Any]]):
        """Opens the files and reads the first record only.

        Args:
            path: a file, a pattern such as 'train/*.array_record', or several of these. The files
                that match a pattern are sorted by name.
            decode: turns the bytes of a record into a dict of arrays, with the same shapes for
                all records.

        Raises:
            ValueError: if no file matches, a file is not an ArrayRecord file, there are no records,
                or the first record is damaged.
        """
        paths = [path] if isinstance(path, str) else list(path)
        files = [file for one in paths for file in _list_files(os.path.expanduser(one))]
        self._files = files
        # Opening reads the index of each file, not its records.
        records = _open(files)
        try:
            super().__init__(_Decoded(records, decode))
        except RuntimeError as error:  # What the library raises for a damaged record.
            raise ValueError(f'{error}, while reading {self.describe(0)}') from error
        except Exception as error:
            # Of an empty file there is no record to name.
            if len(records):
                error.add_note(f'while reading {self.describe(0)}')
            raise

    def describe(self, index: int) -> str:
        """Returns the name of a record for messages: its file and its index in that file."""
        file, position = locate_record(self._items.records, index)
        return f'record {position} of {self._files[file]}'


class _Decoded:
    """A sequence of decoded records."""

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
            raise ValueError(f'path: {files[0]} is not an ArrayRecord file: {error}') from error
        # The library does not say which file is bad: open them one by one to find it.
        for file in files:
            _open([file])
        raise


def _list_files(path: str) -> list[str]:
    if os.path.isfile(path):  # Its name may have brackets.
        return [path]
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise ValueError(
            f'path: no file matches {path!r}, relative to {os.getcwd()}. For all files of a '
            "directory, write 'directory/*.array_record'"
        )
    return files
