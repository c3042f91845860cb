# SPDX-License-Identifier: Apache-2.0
"""The photographs of solar cells, where they are installed, and the message where they are not."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from tests.tools.elpv_floor import choose_test_ids, score_nearest_numbers
from trainer.data.elpv import ELPV, TEST_IDS, find_installed, read_labels
from trainer.data.images import Decode
from trainer.data.rng import ExampleRng

ROWS = """images/cell0001.png  1.0                 mono
images/cell0006.png  0.3333333333333333  poly
images/cell0007.png  0.6666666666666666  poly
images/cell0004.png  0.0                 mono
"""


def test_a_directory(tmp_path: pathlib.Path) -> None:
    """Above one half is defective; the files of ids say which split a photograph is in."""
    (tmp_path / 'labels.csv').write_text(ROWS)
    found = {}
    for split in ('train', 'test'):
        source = ELPV(split, directory=str(tmp_path))
        examples = source.gather(np.arange(len(source)))
        for path, label, kind in zip(
            *(examples[k] for k in ('path', 'label', 'kind')), strict=True
        ):
            name = pathlib.Path(path).stem
            assert (name in TEST_IDS.read_text().split()) == (split == 'test')
            found[name] = (int(label), str(kind))
        assert source.describe(0) == examples['path'][0]
    assert found == {
        'cell0001': (1, 'mono'), 'cell0006': (0, 'poly'),
        'cell0007': (1, 'poly'), 'cell0004': (0, 'mono'),
    }  # fmt: skip


def test_labels_of_the_nearest_number(tmp_path: pathlib.Path) -> None:
    """Test photograph 4 gets that of 3, which comes before 5; and 8 that of 9, which is wrong."""
    rows = ((3, 1.0), (4, 1.0), (5, 0.0), (8, 0.0), (9, 1.0))
    lines = (f'images/cell{number:04}.png {defect} mono' for number, defect in rows)
    (tmp_path / 'labels.csv').write_text('\n'.join(lines))
    assert score_nearest_numbers(str(tmp_path)) == 0.5


@pytest.mark.skipif(
    importlib.util.find_spec('elpv_dataset') is None, reason='needs the package elpv-dataset'
)
def test_the_installed_photographs() -> None:
    """The split is the one that the tool chooses, with as many defects in both parts."""
    rows = read_labels(find_installed())
    assert choose_test_ids(rows) == TEST_IDS.read_text().split()
    train, test = ELPV('train'), ELPV('test')
    assert (len(train), len(test)) == (1967, 657)
    shares = [x.gather(np.arange(len(x)))['label'].mean() for x in (train, test)]
    assert abs(shares[0] - shares[1]) < 0.002
    assert score_nearest_numbers() == pytest.approx(515 / 657)
    one = np.array([3])
    image = Decode(size=300, crop='center', center=1.0)(
        test.gather(one), ExampleRng(0, 0, one, one)
    )
    assert image['image'].shape == (1, 300, 300, 3) and image['image'].std() > 10


def test_messages(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name the command, and the file that is missing."""
    monkeypatch.setitem(sys.modules, 'elpv_dataset', None)
    with pytest.raises(
        ValueError, match=r'not installed:\n  pip install elpv-dataset\n.*directory'
    ):
        ELPV('test')
    with pytest.raises(ValueError, match=r'there is no .*labels\.csv; expected the directory'):
        ELPV('test', directory=str(tmp_path))
    with pytest.raises(ValueError, match="'validation' is neither 'train' nor 'test'"):
        ELPV('validation')
