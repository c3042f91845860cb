# SPDX-License-Identifier: Apache-2.0
"""The message of an out-of-memory error: what fills the memory of a device."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from trainer import compat
from trainer.observe.table import bytes_per_device, human_bytes
from trainer.parallel.mesh import batch_shards
from trainer.step.programs import Programs


def explain(programs: Programs, mesh: Mesh, error: Exception) -> str:
    """Returns a message on what fills a device's memory and what would help."""
    state, spec = programs.abstract, programs.fields.shapes
    batch = sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values())
    lines = [
        'the device is out of memory.',
        f'  train state  {human_bytes(bytes_per_device(state))} per device (parameters '
        f'{human_bytes(bytes_per_device(state.params))}, '
        f'optimizer {human_bytes(bytes_per_device(state.opt_state))})',
        f'  batch        {human_bytes(batch / batch_shards(mesh))} per device',
    ]
    # None if the error came from compiling the step itself, or the backend does not report it.
    temporary = programs.step.temporary_bytes()
    if temporary is not None:
        lines.append(f'  temporaries  {human_bytes(temporary)} in the train step')
    lines += [
        'A smaller config.data.batch_size or a larger config.accumulate shrinks the temporaries; '
        'a smaller model or an optimizer with less state shrinks the train state.',
        f'Runtime error: {compat.runtime_reason(error)}',
    ]
    return '\n'.join(lines)
