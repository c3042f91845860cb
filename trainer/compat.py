# SPDX-License-Identifier: Apache-2.0
"""All uses of private parts or message texts of libraries, each in its own function.

Each function says with which version it was checked, why there is no public way, and what breaks
without it. The test that fails with a new version, in tests/test_compat.py or
tests/test_compat_modules.py, is named after the function to fix. A function that parses a message
returns False, None or the whole text if the wording has changed: users then see the library's own
message, and nothing else changes.

The text of compiled programs (`jax.stages.Compiled.as_text`) is parsed only in
modes/plan/collectives.py. Libraries are imported in the functions that need them: a mistake in the
command line is reported without the seconds that importing JAX takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

# ---- jax ---------------------------------------------------------------------------------------


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service; None before `jax.distributed` has started.

    Callers use its `key_value_set(key, text, allow_overwrite=...)`, `key_value_try_get(key)` and
    `blocking_key_value_get(key, timeout_ms)`, set and get for bytes, and `key_value_delete(key)`.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `jax.distributed` starts the service, but has no public access to its key-value store.
    Without it: process 0 cannot publish the address of its peer watch, and does not receive the
    rows that a score needs.
    """
    from jax._src import distributed

    return distributed.global_state.client


def is_timeout(error: Exception) -> bool:
    """Whether an error says that a value of the coordination service was not there in time.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: the client raises a general error of the runtime, and only its text has the status.
    Without it: a process that waits for a long computation of another one gives up.
    """
    return 'DEADLINE_EXCEEDED' in str(error)


def coordinator_address() -> str:
    """Returns 'host:port' of JAX's coordination service; '' before it has started.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: there is no public way to get the address of a cluster that JAX has detected.
    Without it: the peer watch publishes this host's name, which other hosts may be unable to
    resolve.
    """
    from jax._src import distributed

    return str(distributed.global_state.coordinator_address or '')


def tpu_vm_processes() -> int:
    """Returns the number of hosts of the TPU slice that this machine belongs to; 1 elsewhere.

    Cloud TPU VMs have no environment variable for it; JAX asks their metadata server.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `jax.distributed.initialize` detects the cluster, but fails if there is none.
    Without it: each host of a TPU slice trains a separate run, unless flags declare the processes.
    """
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    except ImportError:  # The module has moved: the flags that declare processes still work.
        return 1
    return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the runtime ran out of memory.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: a `JaxRuntimeError` has no status code, and with the CPU backend not even its text has one.
    Without it: running out of memory shows a traceback instead of advice.
    """
    return 'RESOURCE_EXHAUSTED' in str(error) or 'Out of memory' in str(error)


def runtime_reason(error: BaseException) -> str:
    """Returns a runtime error's first line without its status: 'Out of memory allocating ...'.

    Checked with: jax 0.10.2 and 0.12.0, whose text is 'STATUS: what failed: why'; see
    `is_out_of_memory`.
    Without it: messages repeat the status.
    """
    return (str(error).splitlines() or [''])[0].split(': ')[-1]


def is_deleted_array(error: BaseException) -> bool:
    """Whether JAX refused an array whose buffer was donated or deleted.

    Checked with: jax 0.10.2 and 0.12.0, which raise a RuntimeError or a ValueError, with one text
    for an argument of a function and another for reading an array.
    Why: `Array.is_deleted` needs the array, and the error does not contain it.
    Without it: the advice on donated states is missing.
    """
    text = r'(?:Array|Buffer) has been deleted|deleted or donated'
    return isinstance(error, (RuntimeError, ValueError)) and re.search(text, str(error)) is not None


def unknown_mesh_axis(error: BaseException) -> str | None:
    """Returns the axis in an annotation that the mesh does not have; None for another error.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a ValueError without fields.
    Without it: the advice to add the axis to `config.mesh` is missing.
    """
    match = re.search(r'Resource axis: (\w+) of .* is not found in mesh', str(error))
    return match[1] if match else None


def unbound_axis(error: BaseException) -> str | None:
    """Returns the axis of a collective that no transformation binds; None for another error.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a NameError whose `name` is not set.
    Without it: the advice for models written for `jax.pmap` is missing.
    """
    match = re.search(r'unbound axis name: (\w+)', str(error))
    return match[1] if match and isinstance(error, NameError) else None


def rank_mismatch(error: BaseException) -> tuple[str, int] | None:
    """Returns the spec of a sharding with too many dimensions, and the rank of the array.

    None for another error.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a ValueError without fields.
    Without it: the advice to put the names around the reshaped parameter is missing.
    """
    text = r'.*spec=(.*)\) is only valid for values of rank .* a value of rank (\d+)'
    match = re.search(text, str(error))
    return (match[1], int(match[2])) if match else None


def refuses_type(error: BaseException, kind: type) -> bool:
    """Whether an error says that JAX does not accept values of this class.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: the TypeError has no fields; its text names the class.
    Without it: a task that computes with a field that stays on the host fails with JAX's own
    message, which does not name the field.
    """
    return isinstance(error, TypeError) and kind.__name__ in str(error)


def is_frames_note(note: str) -> bool:
    """Whether a note of an error is that of JAX about the frames that it has hidden.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `JAX_TRACEBACK_FILTERING=off` removes the note, but shows the frames.
    Without it: the note is printed below each error message.
    """
    return 'JAX has removed its internal frames' in note


# ---- jax and flax ------------------------------------------------------------------------------


def is_initializer(value: Any) -> bool:
    """Whether a value is an initializer of JAX or Flax, or was returned by one of their functions.

    Checked with: jax 0.10.2 and 0.12.0, flax 0.12.8 and 0.12.12.
    Why: initializers are plain functions without a common type; they are defined in a private
    module of JAX or a public one of Flax.
    Without it: a config that contains an initializer is refused with less advice, and a string is
    not recognized as the name of one.
    """
    module = getattr(value, '__module__', None) or ''
    return callable(value) and module.endswith(('nn.initializers', 'linen.initializers'))


# ---- optax, and the messages of Python for its functions ----------------------------------------


def missing_arguments(error: BaseException) -> str | None:
    """Returns the arguments that the update of an optimizer lacks; None for another error.

    Checked with: optax 0.2.8 and Python 3.11 to 3.13.
    Why: `optax.GradientTransformationExtraArgs` does not say which arguments it needs.
    Without it: the advice to pass them in a custom step is missing.
    """
    text = r'update\w*\(\) missing \d+ required [\w-]+ arguments?: (.*)'
    match = re.search(text, str(error))
    return match[1].replace("'", '') if match and isinstance(error, TypeError) else None


def refused_argument(error: BaseException) -> str | None:
    """Returns the extra argument that an optimizer's update does not accept, or None.

    Checked with: optax 0.2.8 and Python 3.11 to 3.13.
    Why: the signatures inside a chain are not accessible.
    Without it: a chain with an optimizer that accepts no extra arguments fails.
    """
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return match[1] if match and isinstance(error, TypeError) else None


def is_optax_error(error: BaseException) -> bool:
    """Whether optax raised an error, or called the function of JAX that raised it.

    Checked with: optax 0.2.8.
    Why: optax has no error classes, so the only sign is the frames of the traceback.
    Without it: a mistake in the optimizer's config shows a traceback.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get('__name__')).partition('.')[0] for frame, _ in frames]
    # The innermost frame outside of the libraries that optax calls.
    outside = [name for name in modules if name not in ('jax', 'jaxlib', 'numpy', 'functools')]
    return bool(outside) and outside[-1] in ('optax', 'chex')


# ---- clu ---------------------------------------------------------------------------------------


def is_reduction_counter(name: str) -> bool:
    """Whether a field of a `clu.metrics.Collection` is its reduction counter instead of a metric.

    Checked with: clu 0.0.12.
    Why: a collection lists its metrics only in the annotations of its class, and classes made by
    `create` do not have them there.
    Without it: the counter is treated as a metric.
    """
    return name == '_reduction_counter'


# ---- orbax and tensorstore ---------------------------------------------------------------------


def is_orbax_committed(step_directory: epath.Path) -> bool:
    """Whether a save with `AtomicityMode.COMMIT_FILE` is complete: Orbax writes a file at its end.

    Checked with: orbax-checkpoint 0.12.8.
    Why: `ocp.utils.is_checkpoint_finalized` considers a directory without that file complete on a
    local disk, and importing Orbax takes a second.
    Without it: no checkpoint is found.
    """
    return (step_directory / 'commit_success.txt').exists()


def is_orbax_tree(directory: epath.Path) -> bool:
    """Whether a directory contains a tree of arrays that any version of Orbax wrote.

    Checked with: orbax-checkpoint 0.12.8.
    Why: a handler can only try to read a directory.
    Without it: `config.init_from` does not find checkpoints of other programs.
    """
    # Any of them is enough: the version and the options of Orbax decide which ones exist.
    names = ('_METADATA', 'manifest.ocdbt', '_sharding')
    return any((directory / name).exists() for name in names)


def is_orbax_array(directory: epath.Path) -> bool:
    """Whether a directory contains a single array that `ocp.ArrayCheckpointHandler` wrote.

    Checked with: orbax-checkpoint 0.12.8.
    Why, without it: see `is_orbax_tree`.
    """
    return (directory / 'checkpoint' / '.zarray').exists()


def orbax_step_metadata(step_directory: epath.Path) -> epath.Path:
    """Returns the file with Orbax's own metadata of a step, such as the time of the save.

    Checked with: orbax-checkpoint 0.12.8.
    Why: Orbax reads it at each save, and has no way to check or rewrite it.
    Without it: after a resume, all saves fail if this file of an older step is damaged.
    """
    return step_directory / '_CHECKPOINT_METADATA'


def orbax_step_metadata_fields() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the fields in `orbax_step_metadata` that are objects, and times.

    Checked with: orbax-checkpoint 0.12.8.
    Why: Orbax fails if one of them has another type.
    Without it: see `orbax_step_metadata`.
    """
    objects = 'metrics', 'performance_metrics', 'custom_metadata'
    return objects, ('init_timestamp_nsecs', 'commit_timestamp_nsecs')


def async_options() -> Any:
    """Returns the `ocp.AsyncOptions` with which a save creates its directories before it returns.

    Otherwise the threads of a save wait five minutes for a directory that could not be created, and
    the interpreter waits for the threads.

    Checked with: orbax-checkpoint 0.12.8, which plans to remove this option.
    Without it: after a save to a full or missing disk, the process exits some minutes late.
    """
    import orbax.checkpoint as ocp

    name = 'create_directories_asynchronously'
    # A version without the option would refuse it with a TypeError.
    known = name in {field.name for field in dataclasses.fields(ocp.AsyncOptions)}
    return ocp.AsyncOptions(**{name: False} if known else {})


def commit_future(write: Any, name: str) -> Any:
    """Returns the future of a handler's write, which starts once the directory exists.

    Checked with: orbax-checkpoint 0.12.8.
    Why: the class is exported but not documented, and `ocp.future` has no other one that waits for
    the directory.
    Without it: nothing can be saved.

    Args:
        write: coroutine that writes the checkpoint.
        name: name of the write in Orbax's log.
    """
    from orbax.checkpoint import future

    return future.CommitFutureAwaitingContractedSignals(write, name=name)


def os_error_number(error: BaseException) -> int | None:
    """Returns the number of the operating system's error, such as `errno.ENOSPC`, or None.

    Checked with: tensorstore 0.1.86, whose ValueError has the number in its text only.
    Without it: a write that fails with a temporary error ends the run.
    """
    in_text = re.search(r"os_error_code='(\d+)'", str(error))
    return int(in_text[1]) if in_text else getattr(error, 'errno', None)


def without_details(error: BaseException) -> str:
    """Returns the first line of an error's text, without the details that TensorStore appends.

    Checked with: tensorstore 0.1.86, whose ValueErrors end in text such as " [source
    locations='...']".
    Without it: a message about a damaged checkpoint is a page long.
    """
    # The details are on the first line too, in brackets.
    return re.split(r"\n| \[[\w ]+='| See full TensorStore", str(error), maxsplit=1)[0]


# ---- ml_collections ----------------------------------------------------------------------------


def reference_inputs(reference: Any) -> Iterator[Any]:
    """Yields the references and values that an `ml_collections.FieldReference` is computed from.

    Checked with: ml_collections 1.1.0.
    Why: a reference has public access to its value only, not to its inputs.
    Without it: keys of `config.vars` seem unused, and each one is refused.
    """
    yield reference._value  # The reference that an operation started from.
    for operation in reference._ops:
        yield from operation.args


def is_dotted_key(error: BaseException) -> bool:
    """Whether a ConfigDict refused a key that contains a dot.

    Checked with: ml_collections 1.1.0, which raises a ValueError like any other.
    Without it: the advice to nest dicts is missing.
    """
    return 'dots in field names' in str(error)


def is_type_change(error: BaseException) -> bool:
    """Whether a ConfigDict refused a value whose type differs from that of the old value.

    Checked with: ml_collections 1.1.0, which raises a TypeError like any other.
    Without it: the advice on objects in a config is missing.
    """
    return isinstance(error, TypeError) and 'Could not override field' in str(error)


# ---- tensorboardX ------------------------------------------------------------------------------


def tensorboard_events() -> tuple[Any, Any, Any]:
    """Returns tensorboardX's class `EventsWriter`, and its modules for events and summaries.

    Checked with: tensorboardX 2.6.5.
    Why: `SummaryWriter` writes one event per value, which costs ten times as much, and its queue
    blocks forever once a full disk has ended its thread.
    Without it: there are no event files; `metrics.jsonl` still has all rows.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    return EventsWriter, event_pb2, summary_pb2


def tensorboard_text(name: str, text: str) -> Any:
    """Returns the value of a text in an event.

    Checked with: tensorboardX 2.6.5.
    Why: the metadata by which TensorBoard knows a text are not documented; only `SummaryWriter`
    offers texts.
    Without it: texts are in files only.
    """
    from tensorboardX import summary

    return summary.text(name, text).value[0]


# ---- jax, for modules/ and klinen/ -------------------------------------------------------------


def num_open_calls(functions: tuple[Callable[..., Any], ...]) -> int:
    """Returns the number of calls of these functions on the stack of the caller.

    Checked with: flax 0.12.8 and 0.12.12, jax 0.10.2 and 0.12.0.
    Why: neither library says publicly which branches and loops are being traced. So the frames on
    the stack are compared with the code objects of public functions (`nn.cond`, ...).
    Without it: a recorder stores values in some branches only, and each call of a model with
    `nn.cond`, `nnx.cond`, `jax.lax.while_loop` and the like fails while it is inspected.
    """
    codes = _code_objects(functions)
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        count += frame.f_code in codes
        frame = frame.f_back
    return count


@functools.cache  # A recorder asks in each call of a module.
def _code_objects(functions: tuple[Callable[..., Any], ...]) -> frozenset[types.CodeType]:
    return frozenset(inspect.unwrap(function).__code__ for function in functions)


def branches_differ(error: TypeError, collection: str) -> bool:
    """Whether an error says that branches of `nn.cond` return different variables in a collection.

    Checked with: jax 0.10.2 and 0.12.0, whose message names the branches and the key path.
    Why: it is a plain TypeError.
    Without it: a module that sows in one branch only fails, even if the sown values are not used.
    """
    return all(word in str(error) for word in ('branch', f"'{collection}'"))


def name_stack(equation: Any) -> str:
    """Returns the name scopes of an equation of a jaxpr: 'transpose(jvp(model))/Dense'.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `source_info` of an equation is not documented, and no public function returns the scopes.
    Without it: casts and matrix products cannot be attributed to modules.
    """
    return str(equation.source_info.name_stack)


def is_axis_bound(name: Any) -> bool:
    """Whether a transformation around the caller, such as `jax.vmap(axis_name=...)`, binds an axis.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: there is no public list of the bound axes, and it is not documented that
    `jax.lax.axis_size` raises a NameError for any other axis.
    Without it: normalization layers that name an axis of `jax.pmap` fail.
    """
    import jax

    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def current_trace() -> Any:
    """Returns a value that is equal for two calls iff they are in the same trace of JAX.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: a value of an inner trace, as of `jax.grad`, cannot be used outside of it, and there is no
    public test; JAX only raises an error when it is used. Flax uses this for the same.
    Without it: default predictions of a task that calls its model within a transformation fail
    with JAX's own error.
    """
    from flax.core import tracers

    return tracers.current_trace()


# ---- flax.linen ----------------------------------------------------------------------------------


def missing_stream(error: Exception) -> str | None:
    """Returns the RNG stream that a Linen module has no key for; None for another error.

    Checked with: flax 0.12.8 and 0.12.12, whose `InvalidRngError` says 'needs PRNG for "noise"'.
    Why: the error has no attribute for the name, and a module does not declare its streams.
    Without it: a model with a custom RNG stream fails, because it gets no key for it.
    """
    match = re.search(r'needs PRNG for "([^"]+)"', str(error))
    return match[1] if match else None


def missing_collection(error: Exception) -> str | None:
    """Returns the collection that a Linen module reads but did not get; None for another error.

    Checked with: flax 0.12.8 and 0.12.12, whose message has 'from collection "params"'.
    Why: the error has no attribute for the name.
    Without it: passing bare parameters instead of collections gives Flax's message, not ours.
    """
    match = re.search(r'from collection "([^"]+)"', str(error))
    return match[1] if match else None


def without_collection(collections: Any, name: str) -> Any:
    """Returns a filter of collections (names, a `DenyList`, a bool) without one name.

    Checked with: flax 0.12.8 and 0.12.12; `flax.core.scope.subtract_filters` is not documented.
    Why: filters have no public operations.
    Without it: calls cannot be repeated without intermediates (see `branches_differ`).
    """
    from flax.core.scope import subtract_filters

    return subtract_filters(collections, name)


def fold_in_path(key: Any, path: Sequence[str]) -> Any:
    """Returns the RNG key that the submodule at a path gets from its model's key.

    Checked with: flax 0.12.8 and 0.12.12; `flax.core.scope.LazyRng` is not documented.
    Why: no public function folds a path into a key, or creates a scope at a path.
    Without it: a submodule called alone draws other random numbers than within its model.
    """
    from flax.core.scope import LazyRng

    return LazyRng.create(key, *path)


def set_attribute(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a Linen or NNX module during a call of it.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: Linen freezes modules in a call, and NNX checks the trace level of each assignment.
    `clone` does not help, because the intercepted call runs on this very object.
    Without it: fields such as the axis names of `jax.pmap` cannot be replaced for one call.
    """
    object.__setattr__(module, name, value)


def is_call_of(context: Any, classes: tuple[type, ...]) -> bool:
    """Whether an intercepted call runs the `__call__` that one of these Linen classes defines.

    Checked with: flax 0.12.8 and 0.12.12, where `context.orig_method` is a `functools.partial`.
    Why: a lifted class, such as `nn.vmap(nn.BatchNorm)`, has a method of the same name, which binds
    the axis and then calls Flax's; only their code objects differ.
    Without it: the axis name of a lifted layer is omitted although the axis is bound.
    """
    method = getattr(context.orig_method, 'func', context.orig_method)
    codes = _code_objects(tuple(cls.__call__ for cls in classes))
    return isinstance(context.module, classes) and getattr(method, '__code__', None) in codes


def is_nowrap(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.nowrap`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `nowrap`.
    Why: there is no public function for this test.
    Without it: plain helper methods run as methods of the model in a bound model.
    """
    return hasattr(member, 'nowrap')


def is_compact(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.compact`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `compact`.
    Why: there is no public function for this test.
    Without it: calling a compact method without variables gives Flax's message, not ours.
    """
    return hasattr(member, 'compact')


def is_constructed(module: Any) -> bool:
    """Whether Linen has finished the construction of a module, and protects its fields.

    Checked with: flax 0.12.8 and 0.12.12, whose `__post_init__` sets the attribute `_state`.
    Why: there is no public function for this test.
    Without it: `self.training = False` in a method of a `knn.Module` silently has no effect.
    """
    return '_state' in vars(module)


def run_setup(module: Any) -> None:
    """Runs the `setup` of a bound Linen module if it has not run.

    Checked with: flax 0.12.8 and 0.12.12, whose `Module.__dir__` does it.
    Why: setup is lazy, and the method that runs it, `_try_setup`, is private.
    Without it: a bound model lacks the submodules that `setup` creates.
    """
    dir(module)  # For its side effect.


# ---- flax.linen and flax.nnx ---------------------------------------------------------------------


def objects_under_construction(error: BaseException) -> list[Any]:
    """Returns the objects whose `__init__` an error has left, from the outermost.

    Checked with: Python 3.11 and flax 0.12.8.
    Why: an error does not name the object that was being created; the frames of its traceback have
    it as the local variable `self`.
    Without it: an error within the user's own NNX module is reported as a model that is none.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get('self') for frame in frames if frame.f_code.co_name == '__init__']
    return [owner for owner in found if owner is not None]


# ---- flax.nnx ------------------------------------------------------------------------------------


def make_subclass(kind: Any, call: Callable[..., Any]) -> Any:
    """Returns a subclass of a class of NNX modules that differs in `__call__` only.

    Checked with: flax 0.12.8 and 0.12.12. NNX stores its data about a class as `_pytree__*` in it.
    Why: NNX has no interceptors for methods. The base class is set afterwards, so that a user's
    `__init_subclass__` does not run for our class.
    Without it: NNX modules are not recorded or named in traces, and axis names are not omitted.
    """
    from flax import nnx

    names = {'__call__': call, '__module__': kind.__module__, '__qualname__': kind.__qualname__}
    created: Any = type(kind)(kind.__name__, (nnx.Module,), names, pytree=kind._pytree__is_pytree)
    created.__bases__ = (kind,)
    # Without its own `_pytree__*`, the class inherits those of `kind`.
    for name in [name for name in vars(created) if name.startswith('_pytree__')]:
        delattr(created, name)
    return created


def set_class(node: Any, kind: type) -> None:
    """Changes the class of an NNX module, such as to one of `make_subclass`.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: NNX modules check assignments, and refuse that of their class.
    Without it: see `make_subclass`.
    """
    object.__setattr__(node, '__class__', kind)


def linen_module(bridge: Any) -> Any:
    """Returns the Linen module in an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, which have it as `to_nnx__module`.
    Why: the property `module` is deprecated, and warns.
    Without it: Linen modules in NNX models do not get the training flag.
    """
    return bridge.to_nnx__module


def set_linen_module(bridge: Any, module: Any) -> None:
    """Replaces the Linen module in an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, which have it as `to_nnx__module`.
    Why: the property `module` cannot be set, and a new bridge would have no variables.
    Without it: Linen modules in NNX models do not get the training flag.
    """
    bridge.to_nnx__module = module


def dimension_names(variable: Any) -> Any:
    """Returns the names of the dimensions of an NNX variable; None if it has none.

    Checked with: flax 0.12.8 and 0.12.12, whose metadata has them as 'out_sharding'.
    Why: the properties with these names are deprecated, and warn.
    Without it: `config.sharding` finds no names of dimensions in NNX models.
    """
    return variable.get_metadata().get('out_sharding')


@contextlib.contextmanager
def allow_sow() -> Iterator[None]:
    """Silences NNX's warning about `Module.sow` and `Module.perturb` outside of `nnx.capture`.

    Checked with: flax 0.12.8 and 0.12.12, whose warnings begin with "Using 'Module.".
    Why: the warning recommends `nnx.capture`, which breaks scans and bridges.
    Without it: each call of a model that sows prints a deprecation warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r"\s*Using 'Module\.", DeprecationWarning)
        yield
