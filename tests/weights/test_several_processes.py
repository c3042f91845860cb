# SPDX-License-Identifier: Apache-2.0
"""Weights loaded by several processes, each of which reads its own shards."""

from __future__ import annotations

import pathlib

import pytest

from tests import command
from tests.parallel import group

EDIT = "({'target': 'trainer.weights:Resize', 'pattern': 'Dense_1/kernel', 'size': 64, 'axis': 0},)"


@pytest.mark.slow
def test_two_processes_start_as_one_does(tmp_path: pathlib.Path) -> None:
    """With weights of another run, the first losses on 2 x 2 devices equal those on 1."""
    command.train(tmp_path / 'old', '--config.train_for=40steps')
    args = (
        '--config.train_for=10steps', '--config.evals={}', '--config.mesh.fsdp=2',
        '--config.sharding=fsdp', f'--config.init_from.path={tmp_path / "old"}',
        f'--config.surgery={EDIT}',
    )  # fmt: skip
    group.train(2, tmp_path / 'two', *args, devices=2)
    command.train(tmp_path / 'one', *args[:2], *args[4:])
    command.train(tmp_path / 'fresh', *args[:2])
    names = ('two', 'one', 'fresh')
    two, one, fresh = (command.result(tmp_path / n)['metrics']['train/loss'] for n in names)
    assert two == pytest.approx(one, rel=1e-4)
    assert one < fresh - 0.2
