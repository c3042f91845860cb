# SPDX-License-Identifier: Apache-2.0
"""Explains what fills the memory of a device."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from trainer import compat
from trainer.observe.table import bytes_per_device, human_bytes
from trainer.parallel.mesh import batch_shards
from trainer.step.programs import Programs


def explain(programs: Programs, mesh: Mesh, error: Exception) -> str:
    """Returns what fills a device's memory, and what would help."""
    state, spec = programs.abstract, programs.fields.shapes
    batch = sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values())
    lines = [
        'the device is out of memory.',
        f'  state        {human_bytes(bytes_per_device(state))} on each device (parameters '
        f'{human_bytes(bytes_per_device(state.params))}, '
        f'optimizer {human_bytes(bytes_per_device(state.opt_state))})',
        f'  batch        {human_bytes(batch / batch_shards(mesh))} on each device',
    ]
    temporary = programs.step.temporary_bytes()
    if temporary is not None:
        lines.append(f'  temporaries  {human_bytes(temporary)} in the train step')
    lines += [
        'A smaller config.data.batch_size or a larger config.accumulate shrinks the temporaries; '
        'a smaller model or a leaner optimizer shrinks the state.',
        f'The runtime said: {compat.runtime_reason(error)}',
    ]
    return '\n'.join(lines)
