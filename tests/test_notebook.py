# SPDX-License-Identifier: Apache-2.0
"""The notebook in docs/ runs from top to bottom."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from tests.command import ROOT

PATH = ROOT / 'docs' / 'notebook.ipynb'


def read_cells(kind: str) -> list[str]:
    """Returns the texts of the cells of one kind."""
    notebook = json.loads(PATH.read_text())
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == kind]


def test_the_cells_are_stored_without_outputs() -> None:
    cells = json.loads(PATH.read_text())['cells']
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in cells)
    assert read_cells('markdown')[0].startswith('# ')


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # As in a notebook, no module has the classes of the cells.
    names: dict[str, Any] = {'__name__': '__main__'}
    for number, cell in enumerate(read_cells('code'), 1):
        exec(compile(cell, f'cell {number}', 'exec', dont_inherit=True), names)
    result, longer = names['result'], names['longer']
    assert (result.status, longer.status) == ('finished', 'finished')
    assert result.metrics['eval/test/accuracy'] > 0.8
    assert longer.metrics['eval/test/accuracy'] > 0.8
    assert longer.history['train/loss'].steps.tolist() == [70, 80, 90]
    assert names['on_noise']['examples'] == len(names['digits']) == 37
    assert names['experiment'].origin.config['model']['target'] == '__main__:Net'
    assert not list(tmp_path.iterdir())
