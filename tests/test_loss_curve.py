# SPDX-License-Identifier: Apache-2.0
"""The first 50 losses of the quickstart, committed: a change of numerics shows as a diff.

Rewrite the file with `python -m tests.test_loss_curve`, and say in the commit why it changed.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import pytest

from tests import command

GOLDEN = command.ROOT / 'tests' / 'loss_curve.json'
# CPUs differ in the order of their additions, and 50 updates let the differences grow.
TOLERANCE = 2e-3


def curve(directory: pathlib.Path) -> list[float]:
    """Returns the training loss of each of the first 50 steps."""
    options = ('--config.train_for=50steps', '--config.log.every=1step', f'--workdir={directory}')
    finished = command.run('--config=configs/mnist.py', *options)
    assert finished.code == 0, finished.err
    return [row['train/loss'] for row in command.rows(directory) if 'train/loss' in row]


@pytest.mark.slow
def test_the_first_fifty_losses(tmp_path: pathlib.Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 50
    assert golden[0] > 2.2 > 1.0 > golden[-1]
    assert curve(tmp_path / 'run') == pytest.approx(golden, rel=TOLERANCE)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(curve(pathlib.Path(scratch) / 'run'), indent=1) + '\n')
