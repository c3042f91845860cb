# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes."""

from __future__ import annotations

import pathlib

import pytest
from etils import epath

from trainer.config import files


@pytest.mark.parametrize('sync', [False, True])
def test_a_file_replaces_the_old_one(tmp_path: pathlib.Path, sync: bool) -> None:
    path = epath.Path(tmp_path) / 'file'
    for content in ('first, longer', 'zweite, für Leser', b'\x00bytes', memoryview(b'view')):
        files.replace(path, content, sync=sync)
        expected = content.encode() if isinstance(content, str) else bytes(content)
        assert path.read_bytes() == expected
    assert [each.name for each in tmp_path.iterdir()] == ['file']


def test_a_failed_write_does_not_change_the_file(tmp_path: pathlib.Path) -> None:
    path = epath.Path(tmp_path) / 'file'
    (path / 'inside').mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        files.replace(path, 'text')
    assert [each.name for each in tmp_path.rglob('*')] == ['file', 'inside']
    with pytest.raises(FileNotFoundError):
        files.replace(epath.Path(tmp_path) / 'missing' / 'file', 'text')
