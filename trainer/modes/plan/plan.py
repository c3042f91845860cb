# SPDX-License-Identifier: Apache-2.0
"""`--mode=plan`: estimates memory, FLOPs and traffic of a step on a mesh you need not have.

The train step is compiled for virtual CPU devices; nothing runs, and no array is created. Numbers
derived from shapes and shardings (state, batch, FLOPs, sizes of collectives) hold on any device.
Decisions of the CPU compiler (temporaries, and the choice of collectives) are estimates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from jax.sharding import Mesh

from trainer.config.columns import align_columns
from trainer.modes.command import Command
from trainer.modes.plan import collectives
from trainer.modes.plan.collectives import Collective
from trainer.modes.plan.devices import KINDS, DeviceKind
from trainer.observe import flops, logfile
from trainer.observe.table import bytes_per_device, human_bytes, nbytes
from trainer.parallel.mesh import batch_shards
from trainer.parallel.signals import StopRequest
from trainer.step.programs import Programs
from trainer.trainer import Trainer

_KINDS_OF_STATE = {
    'parameters': 'params',
    'optimizer': 'opt_state',
    'average': 'ema',
    'collections': 'collections',
    'metrics': 'metrics',
    'health': 'health',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources that one step needs.

    Attributes:
        mesh: axis sizes.
        state: bytes per device, by kind.
        unsharded_state: bytes of the whole state on one device.
        batch_size: examples of a global batch.
        shards: number of shards of a batch.
        batch: bytes of a batch per device.
        temporaries: bytes per device, as the CPU compiler estimates; None if it does not.
        flops: FLOPs of a step, summed over all devices.
        collectives: the collective operations of a step.
        is_exact: whether the counts of collectives are exact; if not, a loop of unknown length
            counts as one iteration.
        compile_secs: time that compiling took.
    """

    mesh: Mapping[str, int]
    state: Mapping[str, int]
    unsharded_state: int
    batch_size: int
    shards: int
    batch: int
    temporaries: int | None
    flops: float
    collectives: tuple[Collective, ...]
    is_exact: bool
    compile_secs: float

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> int:
        """Bytes per device: state, batch and temporaries."""
        return sum(self.state.values()) + self.batch + (self.temporaries or 0)

    @property
    def sent_bytes(self) -> float:
        """Bytes per step that a device sends."""
        return sum(each.sent_bytes for each in self.collectives)


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Prints the resources that a step would need."""
    logfile.route(None)
    trainer.check_batch()
    setup, experiment = trainer.set_up(), trainer.experiment
    batch_size = experiment.data.rows(experiment.clock.batch_size)
    print(describe(make(setup.programs, setup.mesh, batch_size), command.device_kind))
    return 0


def make(programs: Programs, mesh: Mesh, batch_size: int) -> Plan:
    """Compiles the train step and returns the resources it needs; nothing runs.

    Args:
        programs: the training programs.
        mesh: the device mesh.
        batch_size: examples of the global batch, padding included.

    Raises:
        UserError: for any mistake that the start of a run would report.
    """
    shards, sizes = batch_shards(mesh), dict(mesh.shape)
    state, spec = programs.abstract, programs.fields.shapes
    step = programs.step
    # From the compiled program: shardings decide where the compiler puts collectives, which the
    # jaxpr does not show.
    operations, is_exact = collectives.find(step.executable().as_text() or '', sizes)
    kinds = {
        name: bytes_per_device(getattr(state, field)) for name, field in _KINDS_OF_STATE.items()
    }
    return Plan(
        mesh=sizes,
        state={name: size for name, size in kinds.items() if size},
        unsharded_state=nbytes(state),
        batch_size=batch_size,
        shards=shards,
        # Batches are sharded over the batch axes alone; along the other axes each device has a
        # copy.
        batch=sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values()) // shards,
        temporaries=step.temporary_bytes(),
        flops=flops.count(step.jaxpr()),
        collectives=tuple(operations),
        is_exact=is_exact,
        compile_secs=step.compile_secs,
    )


def describe(plan: Plan, kind: str | None = None) -> str:
    """Returns the plan as text, compared with a device of `trainer.modes.plan.devices.KINDS`."""
    mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items())
    lines = [f'Train step on {plan.devices:,} devices, mesh {mesh} (compiled, not run)', '']
    if kind is not None:
        lines += [*_fit_lines(plan, kind, KINDS[kind]), '']
    whole = sum(plan.state.values())
    size = f'batch size {plan.batch_size:,}, {plan.batch_size // plan.shards:,} per device'
    temporaries = 'unknown' if plan.temporaries is None else human_bytes(plan.temporaries)
    each = plan.flops / plan.devices
    rows = [
        ('train state', f'{human_bytes(whole)} per device'),
        *((f' {name}', human_bytes(size)) for name, size in plan.state.items()),
        (' total', f'{human_bytes(plan.unsharded_state)} unsharded'),
        ('batch', f'{human_bytes(plan.batch)} per device ({size})'),
        ('temporaries', f"{temporaries} per device (CPU compiler's estimate)"),
        ('compute', f'{plan.flops:.3g} FLOPs per step, {each:.3g} per device'),
    ]
    lines += [*align_columns(rows), '']
    lines += _traffic_lines(plan)
    lines.append(f'Compiled in {plan.compile_secs:.1f} s for virtual CPU devices.')
    return '\n'.join(lines)


def _traffic_lines(plan: Plan) -> Iterator[str]:
    if not plan.collectives:
        yield 'no collectives: the devices do not communicate'
        return
    rows = [('collective', 'axis', 'devices', 'per step', 'bytes', 'sent')]
    for each in plan.collectives:
        sizes = human_bytes(each.nbytes), human_bytes(each.sent_bytes)
        rows.append((each.kind, '+'.join(each.axes), f'{each.group:,}', f'{each.count:,}', *sizes))
    yield from align_columns(rows, right=(2, 3, 4, 5))
    sent = human_bytes(plan.sent_bytes)
    yield f'Each device sends {sent} per step (ring collectives assumed).'
    if not plan.is_exact:
        yield 'A loop of unknown length counts as one iteration: the true numbers are larger.'


def _fit_lines(plan: Plan, name: str, kind: DeviceKind) -> Iterator[str]:
    needed, memory = human_bytes(plan.needed), human_bytes(kind.memory)
    if plan.needed <= kind.memory:
        yield f'fits: {needed} of {memory} ({name})'
    else:
        yield f'DOES NOT FIT: {needed} needed, {memory} available ({name})'
        yield from (f'  {line}' for line in _suggestions(plan, kind))
    # A lower bound: each resource is used at its peak, all at the same time.
    compute = plan.flops / plan.devices / kind.flops
    memory_secs = 2 * sum(plan.state.values()) / kind.bandwidth  # Reads and writes the state.
    links = plan.sent_bytes / (kind.links / 2)  # Sends in one direction of full-duplex links.
    parts = f'compute {_secs(compute)}, state {_secs(memory_secs)}, links {_secs(links)}'
    yield f'time: at least {_secs(max(compute, memory_secs, links))} per step: {parts}'
    yield '      (each at its bfloat16 peak, fully overlapped; a real step takes longer)'


def _suggestions(plan: Plan, kind: DeviceKind) -> Iterator[str]:
    state, temporaries = sum(plan.state.values()), plan.temporaries or 0
    # Nearly as large on each device as in total: so it is not sharded.
    if state > kind.memory / 2 and plan.unsharded_state < 1.5 * state and plan.devices > 1:
        yield (
            'the state is replicated on every device: shard it, as in --config.sharding=fsdp '
            f'--config.mesh=\'{{"data": -1, "fsdp": {min(plan.devices, 8)}}}\''
        )
    elif state > kind.memory / 2:
        yield 'the state takes most of it: use more devices on the axes that shard it (fsdp, model)'
    if temporaries > kind.memory / 4:
        per_device = plan.batch_size // plan.shards
        if per_device > 1:
            count = min(per_device, 4)
            yield f'activations: --config.accumulate={count} splits a batch into micro-batches'
        yield 'activations: --config.model.remat=full, if the model has it, recomputes them'
        yield 'activations: --config.precision.compute=bfloat16 halves them'


def _secs(secs: float) -> str:
    return f'{secs:.3g} s' if secs >= 1 else f'{1000 * secs:.3g} ms'
