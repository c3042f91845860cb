# SPDX-License-Identifier: Apache-2.0
"""Memory, operations and traffic of one step on a mesh of devices that need not be here.

The train step is compiled for virtual CPU devices, and nothing runs: no array is made. What comes
from shapes and shardings (state, batch, operations, collectives' sizes) holds on any device; what
the CPU's compiler decides (temporaries, and which collectives it chooses) is an estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from trainer.experiment import Experiment
from trainer.modes.command import Command
from trainer.modes.plan import collectives
from trainer.modes.plan.collectives import Collective
from trainer.modes.plan.devices import KINDS, DeviceKind
from trainer.observe import flops, logfile
from trainer.observe.table import bytes_per_device, human_bytes, nbytes
from trainer.parallel.mesh import batch_shards
from trainer.parallel.signals import StopRequest
from trainer.run.setup import Setup
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
    """What one step needs.

    Attributes:
        mesh: axis sizes.
        state: bytes on each device, by kind.
        state_in_all: bytes of the whole state, held once.
        rows: rows of a global batch.
        shards: parts that they are cut into.
        batch: bytes of a batch on each device.
        temporaries: bytes on each device, as the CPU's compiler has it; None if it does not say.
        flops: operations of a step, on all devices together.
        collectives: what devices send each other in a step.
        all_counted: whether every loop's collectives are counted as often as it runs.
        compile_secs: time that compiling took here.
    """

    mesh: Mapping[str, int]
    state: Mapping[str, int]
    state_in_all: int
    rows: int
    shards: int
    batch: int
    temporaries: int | None
    flops: float
    collectives: tuple[Collective, ...]
    all_counted: bool
    compile_secs: float

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> int:
        """Bytes on each device: state, batch and temporaries."""
        return sum(self.state.values()) + self.batch + (self.temporaries or 0)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(each.sent_bytes for each in self.collectives)


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Prints what a step would need."""
    logfile.route(None)
    trainer.check_batch()
    print(describe(make(trainer.experiment, trainer.set_up()), command.device_kind))
    return 0


def make(experiment: Experiment, setup: Setup) -> Plan:
    """Compiles the train step and returns what it needs; nothing runs.

    Raises:
        UserError: as the start of a run would.
    """
    programs, shards = setup.programs, batch_shards(setup.mesh)
    state, mesh, spec = programs.abstract, dict(setup.mesh.shape), programs.fields.shapes
    step = programs.step
    found, complete = collectives.find(step.executable().as_text() or '', mesh)
    kinds = {
        name: bytes_per_device(getattr(state, field)) for name, field in _KINDS_OF_STATE.items()
    }
    return Plan(
        mesh=mesh,
        state={name: size for name, size in kinds.items() if size},
        state_in_all=nbytes(state),
        rows=experiment.clock.batch_size,
        shards=shards,
        batch=sum(math.prod(s.shape) * s.dtype.itemsize for s in spec.values()) // shards,
        temporaries=step.temporary_bytes(),
        flops=flops.count(step.jaxpr()),
        collectives=tuple(found),
        all_counted=complete,
        compile_secs=step.compile_secs,
    )


def describe(plan: Plan, kind: str | None = None) -> str:
    """Returns the plan as text, beside a device of `trainer.modes.plan.devices.KINDS`."""
    mesh = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items())
    lines = [f'a step on {plan.devices:,} devices, mesh {mesh}; nothing has run', '']
    if kind is not None:
        lines += [*_fit(plan, kind, KINDS[kind]), '']
    whole = sum(plan.state.values())
    lines.append(f'state        {human_bytes(whole)} on each device')
    lines += [f' {name:<12}{human_bytes(size)}' for name, size in plan.state.items()]
    lines.append(f' in all      {human_bytes(plan.state_in_all)}, held once')
    rows = plan.rows // plan.shards
    batch = f'{plan.rows:,} rows, {rows:,} on each device'
    lines.append(f'batch        {human_bytes(plan.batch)} on each device ({batch})')
    temporaries = 'unknown' if plan.temporaries is None else human_bytes(plan.temporaries)
    lines.append(f"temporaries  {temporaries} on each device, by the CPU compiler's estimate")
    each = plan.flops / plan.devices
    lines.append(f'operations   {plan.flops:.3g} FLOP in a step, {each:.3g} on each device')
    lines.append('')
    lines += _traffic(plan)
    lines.append(f'compiled in {plan.compile_secs:.1f} s, for virtual CPU devices')
    return '\n'.join(lines)


def _traffic(plan: Plan) -> Iterator[str]:
    if not plan.collectives:
        yield 'no collectives: the devices send each other nothing'
        return
    yield f'{"collective":<20}{"axis":<16}{"devices":>7}{"in a step":>11}{"bytes":>11}{"sent":>11}'
    for each in plan.collectives:
        axis, sent = '+'.join(each.axes), human_bytes(each.sent_bytes)
        counts = f'{each.group:>7,}{each.count:>11,}'
        yield f'{each.kind:<20}{axis:<16}{counts}{human_bytes(each.nbytes):>11}{sent:>11}'
    yield f'each device sends {human_bytes(plan.sent_bytes)} in a step, if groups are rings'
    if not plan.all_counted:
        yield 'a loop of unknown length is among them, and counted once'


def _fit(plan: Plan, name: str, kind: DeviceKind) -> Iterator[str]:
    needed, memory = human_bytes(plan.needed), human_bytes(kind.memory)
    if plan.needed <= kind.memory:
        yield f'fits         {needed} of the {memory} of a {name}'
    else:
        yield f'DOES NOT FIT {needed} are needed, and a {name} has {memory}'
        yield from (f'  {line}' for line in _suggestions(plan, kind))
    compute = plan.flops / plan.devices / kind.flops
    memory_secs = 2 * sum(plan.state.values()) / kind.bandwidth
    links = plan.sent_bytes / (kind.links / 2)
    parts = f'compute {_secs(compute)}, state {_secs(memory_secs)}, links {_secs(links)}'
    yield f'time         at least {_secs(max(compute, memory_secs, links))} for a step: {parts}'
    yield '             (bfloat16 peaks, each by itself; a real step takes longer)'


def _suggestions(plan: Plan, kind: DeviceKind) -> Iterator[str]:
    state, temporaries = sum(plan.state.values()), plan.temporaries or 0
    if state > kind.memory / 2 and plan.state_in_all < 1.5 * state and plan.devices > 1:
        yield (
            'every device holds the whole state: cut it, as in --config.sharding=fsdp '
            f'--config.mesh=\'{{"data": -1, "fsdp": {min(plan.devices, 8)}}}\''
        )
    elif state > kind.memory / 2:
        yield 'the state is the larger part: more devices on the axes that cut it (fsdp, model)'
    if temporaries > kind.memory / 4:
        rows = plan.rows // plan.shards
        if rows > 1:
            yield f'activations: --config.accumulate={min(rows, 4)} cuts a batch into slices'
        yield 'activations: --config.model.remat=full, if the model has it, computes them twice'
        yield 'activations: --config.precision.compute=bfloat16 halves them'


def _secs(secs: float) -> str:
    return f'{secs:.3g} s' if secs >= 1 else f'{1000 * secs:.3g} ms'
