# SPDX-License-Identifier: Apache-2.0
"""The summary of a run that is printed before its first step."""

from __future__ import annotations

import jax

from trainer.experiment import Experiment
from trainer.observe.table import bytes_per_device, human_bytes, parameter_table
from trainer.parallel.mesh import batch_shards
from trainer.run.setup import Run, Setup


def summary(run: Run, setup: Setup, step: int) -> str:
    """Returns what a run that starts at `step` says of itself."""
    experiment, state = run.experiment, setup.programs.abstract
    devices = jax.devices()
    shards = batch_shards(setup.mesh)
    mesh = ' x '.join(f'{name} {size}' for name, size in setup.mesh.shape.items())
    per_epoch = experiment.clock.steps_per_epoch
    batch = experiment.clock.batch_size
    workdir = 'none (nothing is written)' if run.workdir is None else run.workdir.path
    lines = [
        parameter_table(state.params, state.collections),
        '',
        f'devices   {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), mesh {mesh}',
        f'state     {human_bytes(bytes_per_device(state))} on each device',
        f'batch     {batch} rows, {batch // shards} on each device',
        f'length    {experiment.training.total_steps:,} steps'
        + (f', {float(per_epoch):,.6g} steps per epoch' if per_epoch else '')
        + (' at the current batch size' if per_epoch and experiment.clock.progress else ''),
        f'workdir   {workdir}',
        f'start     {_start(experiment, step)}',
    ]
    if (ensemble := experiment.ensemble) is not None:
        members = [f'member {i}  {ensemble.describe(i)}' for i in range(ensemble.size)]
        lines += [f'ensemble  {ensemble.size} members', *(f'  {member}' for member in members)]
    return '\n'.join(lines)


def _start(experiment: Experiment, step: int) -> str:
    if step > 0:
        return f'resumed from step {step:,}'
    weights = experiment.start.weights
    if weights is None:
        return 'from the beginning'
    member = '' if weights.member is None else f'member {weights.member} of '
    return f'from the beginning, with weights of {member}{weights.path}'
