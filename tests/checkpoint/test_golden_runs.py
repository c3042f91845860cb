# SPDX-License-Identifier: Apache-2.0
"""Runs of earlier versions resume in this one."""

from __future__ import annotations

import json
import math
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from tests.checkpoint.golden import DIRECTORY, KINDS, STEPS, TOTAL, make_trainer

ARCHIVES = sorted(DIRECTORY.glob('*/*.tar.gz'))


def test_there_is_a_run_of_each_kind() -> None:
    for version in DIRECTORY.iterdir():
        assert {path.name for path in version.iterdir()} == {f'{kind}.tar.gz' for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize('archive', ARCHIVES, ids=lambda path: f'{path.parent.name}-{path.name}')
def test_runs_of_earlier_versions_resume(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    kind = archive.name.removesuffix('.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter='data')
    workdir = tmp_path / kind
    meta = json.loads((workdir / 'checkpoints' / str(STEPS) / 'meta' / 'metadata').read_text())
    trainer = make_trainer(kind, workdir)
    assert trainer.checkpoints is not None
    # The digest is that of the version that saved it: every array is read as it was.
    assert trainer.checkpoints.digest(trainer.restore(STEPS)) == meta['digest']
    result = trainer.fit()
    assert result.step == TOTAL
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    train = [row for row in rows if 'train/loss' in row]
    assert [row['step'] for row in train] == [3, 6, 8]
    assert all(math.isfinite(row['train/loss']) for row in train)

    # A run of this version from the beginning comes to the same, but for other roundings.
    again = make_trainer(kind, tmp_path / 'again').fit()
    for one, other in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(again.state.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
