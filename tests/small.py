# SPDX-License-Identifier: Apache-2.0
"""A trainer whose runs take about a second."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tests.command import ROOT
from trainer.experiment import load_and_build
from trainer.hooks import Event
from trainer.trainer import Trainer

OPTIONS = {
    'train_for': '50 steps',
    'data__source__limit': 640,
    'evals__test__data__source__limit': 100,
    'evals__test__every': '20 steps',
    'checkpoint__every': 'never',
    'log__every': '10 steps',
}


def one_device() -> Mesh:
    """Returns a mesh of one device, where a run compiles and saves faster than on eight."""
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ('data',), kinds, devices=jax.devices()[:1])


def trainer_in(
    workdir: pathlib.Path | None,
    *,
    mesh: Mesh | None = None,
    allow: bool = False,
    hook: Callable[[Event], None] | None = None,
    **overrides: Any,
) -> Trainer:
    """Returns a trainer of a small MLP.

    Args:
        workdir: of its runs, or None.
        mesh: of all devices by default.
        allow: whether its config may differ from that of the run in there.
        hook: its only hook, named 'mine'.
        **overrides: of the config, with '__' for dots.
    """
    experiment = load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), **{**OPTIONS, **overrides})
    if hook is not None:
        experiment = dataclasses.replace(experiment, hooks={'mine': hook})
    directory = None if workdir is None else str(workdir)
    return Trainer(experiment, directory, mesh=mesh, allow_config_change=allow)
