# SPDX-License-Identifier: Apache-2.0
"""The banner: the summary of a run that is printed before its first step."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from trainer.experiment import Experiment
from trainer.observe.table import bytes_per_device, human_bytes, parameter_table
from trainer.parallel.mesh import batch_shards
from trainer.run.workdir import Workdir
from trainer.step.state import TrainState


def summary(
    experiment: Experiment, state: TrainState, mesh: Mesh, workdir: Workdir | None, step: int
) -> str:
    """Returns the banner of a run.

    Args:
        experiment: what is trained.
        state: the shapes of its train state.
        mesh: the device mesh.
        workdir: the run's directory, or None if nothing is written.
        step: where it starts.
    """
    devices = jax.devices()
    # Not the number of devices: those along a model axis work on the same examples.
    shards = batch_shards(mesh)
    axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
    batch_size = experiment.clock.batch_size
    directory = 'none (nothing is written)' if workdir is None else workdir.path
    lines = [
        parameter_table(state.params, state.collections),
        '',
        f'devices      {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), '
        f'mesh {axes}',
        f'train state  {human_bytes(bytes_per_device(state))} per device',
        f'batch size   {_batch_size(experiment, batch_size, shards)}',
        f'training     {_length(experiment)}',
        f'workdir      {directory}',
        _start(experiment, step),
    ]
    if workdir is not None and experiment.origin.objects:
        paths = ', '.join(f'config.{path}' for path in experiment.origin.objects)
        lines.append(
            f'objects      {paths}: of this program, so no command can resume this run; build it '
            'again in Python with the same objects (only their names are compared)'
        )
    if (ensemble := experiment.ensemble) is not None:
        members = [f'member {i}  {ensemble.describe(i)}' for i in range(ensemble.size)]
        lines += [f'ensemble     {ensemble.size} members', *(f'  {member}' for member in members)]
    return '\n'.join(lines)


def _batch_size(experiment: Experiment, batch_size: int, shards: int) -> str:
    number = experiment.data.num_shapes
    if number is None:
        return f'{batch_size} ({batch_size // shards} per device)'
    shapes = 'one shape' if number == 1 else f'at most {number} shapes, each compiled once'
    return f'{batch_size} (whole batches of {shapes})'


def _length(experiment: Experiment) -> str:
    """Returns '18,750 steps = 10 epochs of 1,875 steps'; without epochs only the steps."""
    clock, total = experiment.clock, experiment.training.total_steps
    if clock.steps_per_epoch is None:
        return f'{total:,} steps'
    whole = clock.steps_per_epoch.denominator == 1
    per_epoch = f'{"" if whole else "about "}{round(clock.steps_per_epoch):,} steps'
    epochs = f'{float(clock.batches(total) / clock.steps_per_epoch):,.6g}'
    if clock.progress:
        # Earlier epochs had another number of steps, so the product would not be the total.
        return f'{total:,} steps = {epochs} epochs; {per_epoch} per epoch at this batch size'
    return f'{total:,} steps = {epochs} epoch{"" if epochs == "1" else "s"} of {per_epoch}'


def _start(experiment: Experiment, step: int) -> str:
    if step > 0:
        return f'resuming from step {step:,}'
    weights = experiment.start.weights
    if weights is None:
        return 'starting from scratch'
    member = '' if weights.member is None else f'member {weights.member} of '
    return f'starting from scratch, with weights from {member}{weights.path}'
