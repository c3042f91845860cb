# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of a run, such as init and the train step. Each is compiled once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import flax.linen as nn
import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding

from trainer import compat
from trainer.config.errors import UserError, error_location
from trainer.input.fields import MASK, Fields
from trainer.input.host_field import HostFieldError, HostFieldSpec
from trainer.input.structure import Structure
from trainer.modules import seen
from trainer.modules.nnx_bridge import allow_names_for_rules
from trainer.modules.rng import Keys
from trainer.modules.shapes import changes, describe
from trainer.parallel.mesh import batch_sharding, replicated_sharding, whole_batch_sharding
from trainer.parallel.sharding import Rule, named_axes, param_specs
from trainer.step.context import Batch
from trainer.step.health import Health
from trainer.step.placement import state_shardings
from trainer.step.state import TrainState
from trainer.tasks.batch import flatten_batch, record_reads
from trainer.tasks.returned import name_of
from trainer.tasks.runner import TaskRunner

_log = logging.getLogger('trainer')
# Virtual CPU devices share one thread pool. With too many programs in flight, all threads wait in
# collectives for devices that get no thread, and XLA aborts the process.
_MOST_IN_FLIGHT = 16
# For the same reason collectives that do not depend on each other must come one by one, in the same
# order on each device. In the compiler's usual order as many as possible run at once.
_VIRTUAL_OPTIONS: dict[str, str | bool] = {
    'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
}

# Threads suffice, because JAX releases the GIL while it compiles.
_compiler = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix='compile')


class Program:
    """A function compiled ahead of time for given shapes, in the background.

    Attributes:
        name: what messages call it, such as 'step'.
        compile_secs: seconds of tracing and compiling; complete after `executable()`.
        late_secs: the part of it that was spent in calls, after the first compilation.
        compiles: number of compilations so far.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        tracing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        **jit: Any,
    ):
        """Prepares the program; `start` or the first call compiles it.

        Args:
            name: what messages call it, such as 'step'.
            fn: function to compile.
            arguments: arrays, or their shapes, dtypes and shardings.
            tracing: returns the context in which `fn` is traced.
            **jit: options of `jax.jit`.
        """
        self.name = name
        self.compile_secs = 0.0
        self.late_secs = 0.0
        self.compiles = 0
        self._tracing = tracing
        # JAX hashes the function: a partial is hashable, a bound method of a module with a list
        # in its fields is not.
        run: Any = functools.partial(fn)
        # The name in traces and HLO dumps: 'train_step'.
        run.__name__ = re.sub(r'\W+', '_', name.removeprefix('the ')).strip('_')
        self._jitted = jax.jit(run, **jit)
        self._abstract = jax.tree.map(_shape_spec, arguments)
        self._virtual = _uses_virtual_devices(self._abstract)
        self._calls = 0
        self._future: concurrent.futures.Future[jax.stages.Compiled] | None = None
        self._compiled: Any = None

    def start(self) -> Program:
        """Traces the function and compiles it in the background, once; returns the program.

        It is traced in the caller's thread, because settings such as `jax.default_matmul_precision`
        are per thread.
        """
        if self._future is None:
            config: Any = jax.config  # Its attributes have no types.
            if config.jax_disable_jit:
                raise UserError(
                    f'{self.name} cannot run under jax.disable_jit(): it is compiled before its '
                    'first call. Leave jax.disable_jit() (or JAX_DISABLE_JIT=1) out; to see '
                    'values in a step, use jax.debug.print'
                )
            self._future = _compiler.submit(self._compile, self._lower())
        return self

    def executable(self) -> jax.stages.Compiled:
        """Waits for the compiler and returns the executable."""
        if self._compiled is None:
            self.start()
            assert self._future is not None
            self._compiled = self._future.result()
        return self._compiled

    def temporary_bytes(self) -> int | None:
        """Returns the bytes of temporaries according to the compiler; None if it does not say."""
        try:
            analysis = self.executable().memory_analysis()
        except jax.errors.JaxRuntimeError:
            return None
        return None if analysis is None else int(analysis.temp_size_in_bytes)

    def jaxpr(self) -> Any:
        """Returns the jaxpr of the function."""
        with self._tracing():
            return self._jitted.trace(*self._abstract).jaxpr

    def flops(self) -> float | None:
        """Returns the floating-point operations of a call; None if they cannot be counted.

        They are counted before compiler optimizations. The body of a loop counts once.
        """
        with self._tracing():
            analysis = self._jitted.lower(*self._abstract).cost_analysis()
        return (analysis or {}).get('flops')

    def __call__(self, *args: Any) -> Any:
        """Runs the program. If shapes or dtypes have changed, compiles it again with a warning."""
        compiled = self._compiled or self.executable()
        # Executables check their arguments anyway, so no call pays for a second check here.
        try:
            return self._wait_if_due(compiled(*args))
        except TypeError:
            changed = changes(self._abstract, args)
            if not changed:
                raise
        _log.warning('%s compiles again, because its arguments changed: %s', self.name, changed)
        self._abstract = jax.tree.map(_shape_spec, args)
        before = self.compile_secs
        self._compiled = self._compile(self._lower())
        self.late_secs += self.compile_secs - before
        self._calls = 0
        return self._wait_if_due(self._compiled(*args))

    def _wait_if_due(self, result: Any) -> Any:
        """Waits for the first call, and on virtual devices from time to time.

        Most out-of-memory errors occur in the first call. They are raised here, before the host
        copies the results: see `fetch`.
        """
        # No wait on real devices: it would leave them idle between calls. On several virtual ones
        # it prevents a deadlock: see `_MOST_IN_FLIGHT`.
        self._calls += 1
        if self._calls == 1 or (self._virtual and self._calls % _MOST_IN_FLIGHT == 0):
            jax.block_until_ready(result)
        return result

    def _lower(self) -> jax.stages.Lowered:
        began = time.perf_counter()
        with self._tracing():
            lowered = self._jitted.lower(*self._abstract)
        self.compile_secs += time.perf_counter() - began
        return lowered

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        began = time.perf_counter()
        compiled = lowered.compile(compiler_options=_VIRTUAL_OPTIONS if self._virtual else None)
        self.compiles += 1
        self.compile_secs += time.perf_counter() - began
        return compiled


class ProgramPerShape(Program):
    """A program that is compiled once for each of a few shapes of its last argument, a batch.

    It is prepared for one shape; a call with another one compiles it for that, and says so.
    """

    def __init__(self, name: str, *args: Any, num_shapes: int, where: str, **options: Any):
        """Prepares the program for one shape of the batch.

        Args:
            name: what messages call it, such as 'step'.
            *args: as for `Program`.
            num_shapes: how many shapes there may be.
            where: config path of the data, for messages.
            **options: as for `Program`.
        """
        super().__init__(name, *args, **options)
        self._num_shapes = num_shapes
        self._where = where
        fn, _ = args
        self._prepare: Callable[[Any], Program] = lambda batch: Program(
            name, fn, (*self._abstract[:-1], batch), **options
        )
        self._first_shapes = _shapes_of(self._abstract[-1])
        self._others: dict[Any, Program] = {}

    def __call__(self, *args: Any) -> Any:
        """Runs the program for the shape of the batch.

        Raises:
            UserError: if there are more shapes than expected.
        """
        shapes = _shapes_of(args[-1])
        if shapes == self._first_shapes:
            return super().__call__(*args)
        if shapes not in self._others:
            self._others[shapes] = self._compile_for(args[-1])
        # Counted together: all of them may be in flight at once.
        return self._wait_if_due(self._others[shapes](*args))

    def _compile_for(self, batch: Any) -> Program:
        number = len(self._others) + 2
        fields = ', '.join(f'{n}: {describe(x)}' for n, x in batch.items() if n != MASK)
        if number > self._num_shapes:
            raise UserError(
                f'{self._where}: the source has num_shapes={self._num_shapes}, but a batch has one '
                f'more shape: {fields}. Raise num_shapes, or return fewer shapes from collate'
            )
        _log.warning(
            '%s compiles for another shape of its batches (%d of at most %d): %s',
            *(self.name, number, self._num_shapes, fields),
        )
        program = self._prepare(batch)
        program.executable()
        self.compiles += 1
        self.compile_secs += program.compile_secs
        self.late_secs += program.compile_secs
        return program


def make_program(
    name: str,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    num_shapes: int | None,
    where: str,
    **options: Any,
) -> Program:
    """Returns the program of a function whose last argument is a batch.

    Args:
        name: what messages call it, such as 'step'.
        fn: function to compile.
        arguments: as for `Program`.
        num_shapes: how many shapes whole batches may have; None for batches of rows.
        where: config path of the data, for messages.
        **options: as for `Program`.
    """
    if num_shapes is None:
        return Program(name, fn, arguments, **options)
    return ProgramPerShape(name, fn, arguments, num_shapes=num_shapes, where=where, **options)


class StepKind(Protocol):
    """The interface that `Programs` compile: the step of one model or of an ensemble."""

    @property
    def update(self) -> Callable[[TrainState, Batch], TrainState]:
        """The step: `(state, batch) -> state`."""

    @property
    def task(self) -> TaskRunner:
        """The task, which computes the loss of a batch."""

    @property
    def sweeps(self) -> bool:
        """Whether each step checks all values for non-finite ones."""

    def with_context(self, **changes: Any) -> Self:
        """Returns the step with another context: `changes` are fields of `StepContext`."""

    def with_fields(self, kept: Sequence[HostFieldSpec], is_weighted: bool | None = None) -> Self:
        """Returns the step for batches with fields that stay on the host."""

    def with_state(self, state: TrainState, replicated: Any = None) -> Self:
        """Returns the step for states of one model with this structure."""

    def state_specs(self, state: TrainState, mesh: Mesh) -> TrainState:
        """Returns the shapes and shardings of the whole state, from those of one model's."""

    def init_boxed(self, spec: Mapping[str, Any]) -> TrainState:
        """Returns the first state of one model, variables in the boxes that name dimensions."""

    def init(self, spec: Mapping[str, Any]) -> TrainState:
        """Returns the first state, from the shapes of a training batch."""

    def restart_optimizer(self, state: TrainState) -> TrainState:
        """Returns the state with optimizer state and average initialized from its parameters."""

    def examine(self, state: TrainState) -> Health:
        """Returns the health of a state that training starts from."""

    def sweep(self, state: TrainState) -> Health:
        """Returns the health of a state, checking its parameters and slots."""

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters that are evaluated."""

    def empty_metrics(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """Returns empty accumulators."""


class Programs:
    """All programs of training, for one step on one mesh.

    Attributes:
        abstract: the state's shapes, dtypes and shardings.
        fields: the fields of a batch that the step reads; only these are sent to the devices.
    """

    def __init__(
        self,
        train_step: StepKind,
        spec: Mapping[str, Any],
        mesh: Mesh,
        *,
        structure: Structure | None = None,
        sharding: Sequence[Rule] = (),
        fused: int = 1,
        num_shapes: int | None = None,
        is_collected: bool = False,
    ):
        """Traces the shapes; programs are compiled at their first use.

        Args:
            train_step: the functions of the step.
            spec: shape and dtype of each field of a global batch from the loader.
            mesh: the device mesh.
            structure: tree structure of nested batches; None for a dict of arrays.
            sharding: rules that shard parameters over the mesh.
            fused: number of updates that `step.fused` makes in one call.
            num_shapes: how many shapes whole batches may have; None for batches of rows.
            is_collected: whether the step makes its batches itself, and gets empty ones.
        """
        self._mesh = mesh
        self._is_collected = is_collected
        self._num_shapes = num_shapes
        self._fused_steps = fused
        self._tracing = functools.partial(named_axes, sharding, mesh)
        fields = Fields.from_spec(spec, 'config.data', num_shapes=num_shapes)
        self._shapes = fields.shapes
        task = train_step.task.with_structure(structure)
        train_step = train_step.with_context(task=task)
        self._first_step = train_step.with_fields(fields.host_fields())
        # The first trace shows which fields the task reads, and whether it returns weights. All
        # later traces are for batches with only those fields.
        with self._tracing(), record_reads() as reads:
            named = _init_shapes(self._first_step, self._shapes)
        self.fields = fields.with_read(reads.names, train_step.task.transforms)
        train_step = train_step.with_fields(self.fields.host_fields(), reads.weighted)
        shapes = meta.unbox(named)
        with allow_names_for_rules():
            names = nn.get_partition_spec(named.params)
        specs = param_specs(shapes.params, names, sharding, mesh)
        # The state of one model; for an ensemble, `state_specs` below adds the member dimension.
        one: TrainState = jax.tree.map(_to_spec, shapes, state_shardings(shapes, specs, mesh))
        replicated = jax.tree.map(lambda leaf: leaf.sharding.is_fully_replicated, one.params)
        self._train_step = train_step.with_state(one, replicated)
        self.abstract = train_step.state_specs(one, mesh)

    @property
    def sweeps(self) -> bool:
        """Whether each step checks all values for non-finite ones: see `StepContext`."""
        return self._train_step.sweeps

    @functools.cached_property
    def step(self) -> Program:
        """One update: `(state, batch) -> state`, donating the state."""
        return make_program(
            'the train step',
            self._train_step.update,
            (self.abstract, self._batch()),
            num_shapes=self._num_shapes,
            where=self.fields.where,
            tracing=self._tracing,
            donate_argnums=0,
            keep_unused=_keeps_unused_arguments(self._mesh),
            out_shardings=self._shardings,
        )

    @functools.cached_property
    def fused(self) -> Program:
        """`steps_per_call` updates in one call, on stacked batches (steps, batch, ...)."""

        def run_steps(state: TrainState, batches: Any) -> TrainState:
            update = self._train_step.update
            # The length in any case: batches that the step makes itself are empty.
            steps = self._fused_steps
            return jax.lax.scan(lambda s, b: (update(s, b), None), state, batches, steps)[0]

        return make_program(
            f'the program of {self._fused_steps} train steps',
            run_steps,
            (self.abstract, self._batch((self._fused_steps,))),
            num_shapes=self._num_shapes,
            where=self.fields.where,
            tracing=self._tracing,
            donate_argnums=0,
            keep_unused=_keeps_unused_arguments(self._mesh),
            out_shardings=self._shardings,
        )

    @functools.cached_property
    def init(self) -> Program:
        """The initial state: `() -> state`, with every leaf created in its sharding."""
        return Program(
            'the program that makes the state',
            lambda: self._first_step.init(self._shapes),
            (),
            tracing=self._tracing,
            out_shardings=self._shardings,
        )

    @functools.cached_property
    def restart_optimizer(self) -> Program:
        """The optimizer state for changed parameters: `state -> state`, donating the state."""
        return Program(
            'the program that makes the optimizer state',
            self._train_step.restart_optimizer,
            (self.abstract,),
            tracing=self._tracing,
            donate_argnums=0,
            # Otherwise the old slots, which the program does not read, would not be donated and
            # would take up memory together with the new ones.
            keep_unused=True,
            out_shardings=self._shardings,
        )

    @functools.cached_property
    def examine(self) -> Program:
        """The health of a state that was restored: `state -> health`."""
        return Program(
            'the program that examines the state',
            self._train_step.examine,
            (self.abstract.durable,),
            tracing=self._tracing,
            out_shardings=replicated_sharding(self._mesh),
        )

    @functools.cached_property
    def sweep(self) -> Program:
        """The health of a state, checking its parameters and slots: `state -> health`."""
        return Program(
            'the program that checks for non-finite values',
            self._train_step.sweep,
            (self.abstract,),
            tracing=self._tracing,
            out_shardings=replicated_sharding(self._mesh),
        )

    @functools.cached_property
    def eval_params(self) -> Program:
        """The parameters that are evaluated: `(state without metrics) -> params`."""
        return Program(
            'the program that makes the parameters to evaluate',
            self._train_step.eval_params,
            (dataclasses.replace(self.abstract.durable, metrics=None),),
            tracing=self._tracing,
            out_shardings=self._shardings.params,
        )

    @functools.cached_property
    def empty_metrics(self) -> Program:
        """Empty accumulators: `() -> metrics`."""
        return Program(
            'the program that makes empty accumulators',
            lambda: self._train_step.empty_metrics(self.abstract, self.fields.shapes),
            (),
            tracing=self._tracing,
            out_shardings=replicated_sharding(self._mesh),
        )

    def jaxpr(self, model: Any) -> Any:
        """Returns the jaxpr of one update with another model of the same variables.

        Args:
            model: called as `model.bind(...)`, such as a `RecordedModel` (`modules.functional`).
        """
        step = self._train_step.with_context(model=model).update
        with self._tracing():
            return jax.make_jaxpr(step)(self.abstract, self._batch())

    @property
    def task(self) -> TaskRunner:
        """The task of the step, for batches with these fields."""
        return self._train_step.task

    @property
    def _shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def _batch(self, leading: tuple[int, ...] = ()) -> dict[str, Any]:
        if self._is_collected:
            return {}
        count = len(leading)
        rows, batch = batch_sharding(self._mesh, leading_dims=count), {}
        for name, s in self.fields.shapes.items():
            shape, sharding = (*leading, *s.shape), rows
            if self._num_shapes is not None:
                sharding = whole_batch_sharding(self._mesh, shape, leading_dims=count)
            batch[name] = jax.ShapeDtypeStruct(shape, s.dtype, sharding=sharding)
        return batch


def _init_shapes(train_step: StepKind, spec: Mapping[str, Any]) -> Any:
    """Returns the shapes of `init_boxed`; errors of the model get a note with the batch."""
    try:
        with seen.explain_errors():
            # A new function object: with a cached trace, no reads would be recorded.
            return jax.eval_shape(lambda spec: train_step.init_boxed(spec), spec)
    except HostFieldError as error:
        raise UserError(f'config.data: {error}') from error
    except UserError:
        raise
    except Exception as error:
        # JAX's messages for these three name no config key and no fix.
        if name := compat.unknown_mesh_axis(error):
            raise UserError(
                f'config.mesh: the model names the mesh axis {name!r}, which the mesh does not '
                f'have. Add it, with size 1 if nothing should be sharded: --config.mesh.{name}=1'
            ) from error
        if axis := compat.unbound_axis(error):
            raise UserError(_unbound_axis_message(axis, error)) from error
        if wrong := compat.rank_mismatch(error):
            raise UserError(
                f'the model or the task requests the sharding {wrong[0]} for an array that has '
                f'{wrong[1]} dimensions{error_location(error)}. Name a mesh axis, or None, for '
                'each dimension that the array has there. If a parameter is initialized in another '
                'shape, put the names around the reshaped array: '
                'box.replace_boxed(box.value.reshape(shape))'
            ) from error
        task, fields = train_step.task, spec
        with contextlib.suppress(Exception):  # The error may be that of a transform.
            keys = Keys(seed=0, mode='init')  # Only shapes are needed.
            prepare = functools.partial(task.prepare_batch, keys=keys)
            fields = jax.eval_shape(lambda batch: flatten_batch(prepare(batch)), spec)
        batch = ', '.join(f'{name}: {describe(x)}' for name, x in fields.items())
        error.add_note(f'The task {name_of(task.task)} was called with the batch {batch}')
        raise


def _unbound_axis_message(axis: str, error: Exception) -> str:
    """Returns the message for a collective over an axis that no transformation has bound."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = (
        'of the mesh, which only jax.shard_map binds' if axis in mesh.axis_names else 'of jax.pmap'
    )
    return (
        f'the model or the task names the axis {axis!r} {kind}{error_location(error)}, but no '
        'such axis is bound: a step is one program over the whole batch, on any number of devices. '
        f'Remove the collective, or axis_name={axis!r}: means over the batch, gradients, metrics '
        'and the statistics of normalization layers are already those of the global batch. For '
        'statistics of groups of examples use trainer.models.norm:GroupedBatchNorm; to bind an '
        'axis of your own use jax.vmap(..., axis_name=...)'
    )


def _to_spec(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _keeps_unused_arguments(mesh: Mesh) -> bool:
    """Returns whether a step keeps its unused arguments; for speed only, and not on CPUs.

    JAX matches donated arguments to results by shape, in order. If unused ones are dropped, leaves
    move to other buffers, which costs copies and prevents the replay of CUDA graphs. CPUs have no
    such graphs.
    """
    # On accelerators only the pairs of buffers have been checked (`tests/step/test_programs.py`),
    # not the time. On a CPU each argument costs time, too little to measure: without them, a step
    # of the MLP takes 0.96 [0.83, 1.12] of the CPU time (`tests/benchmarks/beside.py OTHER mlp`, 11
    # pairs, jax 0.10.2).
    return mesh.devices.flat[0].platform != 'cpu'


def _uses_virtual_devices(abstract: Any) -> bool:
    shardings = [x.sharding for x in jax.tree.leaves(abstract) if x.sharding is not None]
    return any(
        len(s.device_set) > 1 and next(iter(s.device_set)).platform == 'cpu' for s in shardings
    )


def _shapes_of(batch: Any) -> tuple[Any, ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def _shape_spec(x: Any) -> jax.ShapeDtypeStruct:
    # An uncommitted array has no sharding that the program must follow.
    placed = getattr(x, 'committed', True)
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=getattr(x, 'sharding', None) if placed else None
    )
