# SPDX-License-Identifier: Apache-2.0
"""Every reliance on private parts or message texts of a library, each in a function of its own.

Each function says which version it was checked with, why there is no public way, and what breaks
without it; tests/test_compat.py and tests/test_compat_modules.py name the one that a new version
breaks. A function that reads a message returns False, None or the whole text where the wording is
another: then an error is shown as the library words it, and nothing else changes.

The text of a compiled program, which `jax.stages.Compiled.as_text` makes, is read in
modes/plan/collectives.py alone. No library is imported before a function needs it: a command line
with a mistake in it is answered without JAX.
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

    Its `key_value_set(key, text)` and `blocking_key_value_get(key, timeout_ms)` are used.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `jax.distributed` starts the service and offers no values in it.
    Without it: a process cannot tell the others where its peer watch listens.
    """
    from jax._src import distributed

    return distributed.global_state.client


def coordinator_address() -> str:
    """Returns 'host:port' of JAX's coordination service; '' before it has started.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: where JAX has detected the cluster itself, it tells nobody the address.
    Without it: the peer watch falls back on this host's name, which other hosts may not be able to
    resolve.
    """
    from jax._src import distributed

    return str(distributed.global_state.coordinator_address or '')


def tpu_vm_processes() -> int:
    """Returns the number of hosts of the TPU slice that this machine belongs to; 1 elsewhere.

    A Cloud TPU VM has no variable that says so; JAX asks its metadata server.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `jax.distributed.initialize` detects the cluster, but fails where there is none.
    Without it: a multi-host TPU trains as so many separate runs unless the processes are declared
    by flags.
    """
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    except ImportError:
        return 1
    return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the runtime failed for want of memory.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: a `JaxRuntimeError` has no status code; the CPU backend does not even write one into its
    text.
    Without it: such an error is a traceback.
    """
    return 'RESOURCE_EXHAUSTED' in str(error) or 'Out of memory' in str(error)


def runtime_reason(error: BaseException) -> str:
    """Returns a runtime error's first line without its status: 'Out of memory allocating ...'.

    Checked with: jax 0.10.2 and 0.12.0, whose text is 'STATUS: what failed: why'; see
    `is_out_of_memory`.
    Without it: a message repeats the status.
    """
    return (str(error).splitlines() or [''])[0].split(': ')[-1]


def is_deleted_array(error: BaseException) -> bool:
    """Whether JAX refused an array whose buffer was donated or deleted.

    Checked with: jax 0.10.2 and 0.12.0, which raise a RuntimeError or a ValueError, with one text
    for an argument of a function and another for an array that is read.
    Why: `Array.is_deleted` answers for an array at hand, and the error does not hold it.
    Without it: the advice on donated states is missing.
    """
    text = r'(?:Array|Buffer) has been deleted|deleted or donated'
    return isinstance(error, (RuntimeError, ValueError)) and re.search(text, str(error)) is not None


def unknown_mesh_axis(error: BaseException) -> str | None:
    """Returns the axis that an annotation names and the mesh does not have.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a ValueError without fields.
    Without it: the advice to add the axis to `config.mesh` is missing.
    """
    found = re.search(r'Resource axis: (\w+) of .* is not found in mesh', str(error))
    return found[1] if found else None


def unbound_axis(error: BaseException) -> str | None:
    """Returns the axis of a collective that no transformation has bound.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a NameError whose `name` is not set.
    Without it: the advice for models written for `jax.pmap` is missing.
    """
    found = re.search(r'unbound axis name: (\w+)', str(error))
    return found[1] if found and isinstance(error, NameError) else None


def wrong_rank(error: BaseException) -> tuple[str, int] | None:
    """Returns the spec of a sharding for more dimensions than the array has, and their number.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: JAX raises a ValueError without fields.
    Without it: the message does not say that the names belong around the reshaped parameter.
    """
    text = r'.*spec=(.*)\) is only valid for values of rank .* a value of rank (\d+)'
    found = re.search(text, str(error))
    return (found[1], int(found[2])) if found else None


def refuses_type(error: BaseException, kind: type) -> bool:
    """Whether JAX says that it takes no value of this class.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: the TypeError has no fields; its text names the class.
    Without it: a task that computes with a field that stays on the host gets JAX's own message,
    which does not name the field.
    """
    return isinstance(error, TypeError) and kind.__name__ in str(error)


def is_note_on_frames(note: str) -> bool:
    """Whether a note of an error is JAX's, which says that it has hidden its own frames.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `JAX_TRACEBACK_FILTERING=off` drops the note and shows the frames.
    Without it: the note is printed below each error message.
    """
    return 'JAX has removed its internal frames' in note


# ---- jax and flax ------------------------------------------------------------------------------


def is_initializer(value: Any) -> bool:
    """Whether a value is an initializer of JAX or Flax, or one that a function there has made.

    Checked with: jax 0.10.2 and 0.12.0, flax 0.12.8 and 0.12.12.
    Why: an initializer is a mere function, defined in a private module of JAX or a public one of
    Flax.
    Without it: a config that holds one is refused with less advice, and a word is not understood as
    the name of one.
    """
    module = getattr(value, '__module__', None) or ''
    return callable(value) and module.endswith(('nn.initializers', 'linen.initializers'))


# ---- optax, and the texts of Python that it leads to -------------------------------------------


def missing_arguments(error: BaseException) -> str | None:
    """Returns the names of the arguments that an optimizer's update was not given, as Python says.

    Checked with: optax 0.2.8 and Python 3.11 to 3.13.
    Why: `optax.GradientTransformationExtraArgs` does not say which arguments it needs.
    Without it: the advice to pass them in a step is missing.
    """
    text = r'update\w*\(\) missing \d+ required [\w-]+ arguments?: (.*)'
    found = re.search(text, str(error))
    return found[1].replace("'", '') if found and isinstance(error, TypeError) else None


def refused_argument(error: BaseException) -> str | None:
    """Returns the name of the extra argument that an optimizer's update does not take.

    Checked with: optax 0.2.8 and Python 3.11 to 3.13.
    Why: the signatures inside a chain are hidden.
    Without it: an optimizer that takes no extra arguments fails inside a chain.
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found[1] if found and isinstance(error, TypeError) else None


def is_of_optax(error: BaseException) -> bool:
    """Whether optax raised an error, or called the function of JAX that did.

    Checked with: optax 0.2.8.
    Why: its errors have no class of their own, so the frames have to say.
    Without it: a mistake in the optimizer's config is a traceback.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get('__name__')).partition('.')[0] for frame, _ in frames]
    outside = [name for name in modules if name not in ('jax', 'jaxlib', 'numpy', 'functools')]
    return bool(outside) and outside[-1] in ('optax', 'chex')


# ---- clu ---------------------------------------------------------------------------------------


def is_own_field(name: str) -> bool:
    """Whether a field of a `clu.metrics.Collection` is the library's own, and no metric.

    Checked with: clu 0.0.12, whose collections count their reductions in a field.
    Why: it has no list of its metrics other than the annotations of the class, where those of
    `create` are not.
    Without it: the counter is treated as a metric.
    """
    return name == '_reduction_counter'


# ---- orbax and tensorstore ---------------------------------------------------------------------


def is_orbax_committed(step_directory: epath.Path) -> bool:
    """Whether a save with `AtomicityMode.COMMIT_FILE` has ended: its last act is to write a file.

    Checked with: orbax-checkpoint 0.12.8.
    Why: `ocp.utils.is_checkpoint_finalized` takes a directory without that file for finished on a
    local disk, and importing Orbax takes a second.
    Without it: no checkpoint is found.
    """
    return (step_directory / 'commit_success.txt').exists()


def is_orbax_tree(directory: epath.Path) -> bool:
    """Whether Orbax has written a tree of arrays into a directory, in any of its versions.

    Checked with: orbax-checkpoint 0.12.8.
    Why: a handler can only try to read.
    Without it: `config.init_from` does not find checkpoints that others have written.
    """
    names = ('_METADATA', 'manifest.ocdbt', '_sharding')
    return any((directory / name).exists() for name in names)


def is_orbax_array(directory: epath.Path) -> bool:
    """Whether `ocp.ArrayCheckpointHandler` has written a bare array into a directory.

    Checked with: orbax-checkpoint 0.12.8; otherwise as `is_orbax_tree`.
    """
    return (directory / 'checkpoint' / '.zarray').exists()


def orbax_step_metadata(step_directory: epath.Path) -> epath.Path:
    """Returns the file with Orbax's own notes about a step, such as when it was saved.

    Checked with: orbax-checkpoint 0.12.8.
    Why: Orbax reads it at each save, and has no way to check or to rewrite it.
    Without it: a damaged one fails all saves of a run that resumes.
    """
    return step_directory / '_CHECKPOINT_METADATA'


def orbax_step_metadata_fields() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the objects and of the times in `orbax_step_metadata`.

    Checked with: orbax-checkpoint 0.12.8.
    Why: Orbax fails if one of them is of another kind.
    Without it: as `orbax_step_metadata`.
    """
    objects = 'metrics', 'performance_metrics', 'custom_metadata'
    return objects, ('init_timestamp_nsecs', 'commit_timestamp_nsecs')


def synchronous_directories() -> Any:
    """Returns the `ocp.AsyncOptions` with which a save makes its directories before it returns.

    Otherwise all other threads of a save wait five minutes for a directory that could not be
    created, and the interpreter waits for them.

    Checked with: orbax-checkpoint 0.12.8, which plans to remove this option.
    Without it: a save to a full or missing disk ends the process some minutes late.
    """
    import orbax.checkpoint as ocp

    name = 'create_directories_asynchronously'
    known = name in {field.name for field in dataclasses.fields(ocp.AsyncOptions)}
    return ocp.AsyncOptions(**{name: False} if known else {})


def commit_future(write: Any, name: str) -> Any:
    """Returns the future of a handler's write, which begins when the directory is there.

    Checked with: orbax-checkpoint 0.12.8.
    Why: the class is exported and not documented; `ocp.future` has no other one that waits for the
    directory.
    Without it: nothing can be saved.

    Args:
        write: a coroutine.
        name: of the write, for Orbax's log.
    """
    from orbax.checkpoint import future

    return future.CommitFutureAwaitingContractedSignals(write, name=name)


def os_error_number(error: BaseException) -> int | None:
    """Returns the number of the operating system's error, such as `errno.ENOSPC`.

    Checked with: tensorstore 0.1.86, whose ValueError has the number in its text only.
    Without it: a failed write that may pass by itself ends the run.
    """
    in_text = re.search(r"os_error_code='(\d+)'", str(error))
    return int(in_text[1]) if in_text else getattr(error, 'errno', None)


def without_details(error: BaseException) -> str:
    """Returns the first line of an error's text, without the page that TensorStore adds to it.

    Checked with: tensorstore 0.1.86, whose ValueErrors end in details such as " [source
    locations='...']".
    Without it: a message about a damaged checkpoint is a page long.
    """
    return re.split(r"\n| \[[\w ]+='| See full TensorStore", str(error), maxsplit=1)[0]


# ---- ml_collections ----------------------------------------------------------------------------


def reference_inputs(reference: Any) -> Iterator[Any]:
    """Yields what an `ml_collections.FieldReference` is computed from: references and values.

    Checked with: ml_collections 1.1.0.
    Why: a reference offers its value and no way back to its inputs.
    Without it: a key of `config.vars` cannot be seen to be used, and each one is refused.
    """
    yield reference._value  # The reference that an operation started from.
    for operation in reference._ops:
        yield from operation.args


def is_dotted_key(error: BaseException) -> bool:
    """Whether a ConfigDict refused a key with a dot in it.

    Checked with: ml_collections 1.1.0, which raises a ValueError like any other.
    Without it: the advice to nest dicts is missing.
    """
    return 'dots in field names' in str(error)


def is_other_type(error: BaseException) -> bool:
    """Whether a ConfigDict refused a value of another type than the one before.

    Checked with: ml_collections 1.1.0, which raises a TypeError like any other.
    Without it: the advice on objects in a config is missing.
    """
    return isinstance(error, TypeError) and 'Could not override field' in str(error)


# ---- tensorboardX ------------------------------------------------------------------------------


def tensorboard_events() -> tuple[Any, Any, Any]:
    """Returns tensorboardX's writer of events, and the modules of its events and summaries.

    Checked with: tensorboardX 2.6.5.
    Why: `SummaryWriter` makes an event for each value, ten times the work, and writes in a thread
    whose queue blocks for ever once a full disk has ended it.
    Without it: there are no event files; `metrics.jsonl` has all rows.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    return EventsWriter, event_pb2, summary_pb2


# ---- jax, for modules/ and klinen/ -------------------------------------------------------------


def num_open_calls(functions: tuple[Callable[..., Any], ...]) -> int:
    """Returns how many calls of these functions enclose the caller: its tracing happens in them.

    Checked with: flax 0.12.8 and 0.12.12, jax 0.10.2 and 0.12.0.
    Why: neither library has a public mark of the branches and loops that are being traced. The
    frames on the stack are compared by their code objects, which are those of public functions.
    Without it: a recorder stores values in some branches only, and every call of a model with
    `nn.cond`, `nnx.cond`, `jax.lax.while_loop` and the like fails while it is inspected.
    """
    codes = _codes(functions)
    frame, count = inspect.currentframe(), 0
    while frame is not None:
        count += frame.f_code in codes
        frame = frame.f_back
    return count


@functools.cache
def _codes(functions: tuple[Callable[..., Any], ...]) -> frozenset[types.CodeType]:
    return frozenset(inspect.unwrap(function).__code__ for function in functions)


def branches_differ(error: TypeError, collection: str) -> bool:
    """Whether an error says that branches of `nn.cond` leave different variables in a collection.

    Checked with: jax 0.10.2 and 0.12.0. The message names branches and key path.
    Why: it is a plain TypeError.
    Without it: a module that sows in one branch only fails although nobody reads what it sows.
    """
    return all(word in str(error) for word in ('branch', f"'{collection}'"))


def name_stack(equation: Any) -> str:
    """Returns the scopes that an equation of a jaxpr was traced in: 'transpose(jvp(model))/Dense'.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: `source_info` of an equation is not documented, and no public function prints the scopes.
    Without it: casts and products cannot be attributed to the modules that make them.
    """
    return str(equation.source_info.name_stack)


def is_axis_bound(name: Any) -> bool:
    """Whether a transformation around the caller, such as `jax.vmap(axis_name=...)`, binds a name.

    Checked with: jax 0.10.2 and 0.12.0.
    Why: there is no public list of the bound axes; that `jax.lax.axis_size` raises a NameError for
    others is not documented.
    Without it: normalisation layers that name an axis of `jax.pmap` fail.
    """
    import jax

    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


# ---- flax.linen ----------------------------------------------------------------------------------


def missing_stream(error: Exception) -> str | None:
    """Returns the random stream that a Linen module has no key for; None for another error.

    Checked with: flax 0.12.8 and 0.12.12, whose `InvalidRngError` says 'needs PRNG for "noise"'.
    Why: the error has no attribute for the name, and a module does not declare its streams.
    Without it: a model that draws from a stream of its own fails for want of a key.
    """
    match = re.search(r'needs PRNG for "([^"]+)"', str(error))
    return match[1] if match else None


def missing_collection(error: Exception) -> str | None:
    """Returns the collection that a Linen module reads and was not given; None for another error.

    Checked with: flax 0.12.8 and 0.12.12. The message has 'from collection "params"'.
    Why: the error has no attribute for the name.
    Without it: parameters passed where collections are expected give Flax's message, not ours.
    """
    match = re.search(r'from collection "([^"]+)"', str(error))
    return match[1] if match else None


def without_collection(collections: Any, name: str) -> Any:
    """Returns a filter of collections (names, a `DenyList`, a bool) that leaves one name out.

    Checked with: flax 0.12.8 and 0.12.12: `flax.core.scope.subtract_filters`, not documented.
    Why: filters have no public operations.
    Without it: calls cannot be repeated without intermediates (see `branches_differ`).
    """
    from flax.core.scope import subtract_filters

    return subtract_filters(collections, name)


def key_below(key: Any, path: Sequence[str]) -> Any:
    """Returns a random key as it arrives in the submodule at a path: folded with it when it draws.

    Checked with: flax 0.12.8 and 0.12.12: `flax.core.scope.LazyRng`, not documented.
    Why: no public function folds a path into a key, nor can a scope be made at a path.
    Without it: a part of a bound model draws other random numbers alone than within the model.
    """
    from flax.core.scope import LazyRng

    return LazyRng.create(key, *path)


def set_in_call(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module that is being called, Linen or NNX.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: Linen freezes modules in a call, and NNX checks the trace level of each assignment.
    `clone` is no way round: the call that is intercepted is one of this very object.
    Without it: fields cannot be replaced for one call, such as the axis names of `jax.pmap`.
    """
    object.__setattr__(module, name, value)


def is_call_of(context: Any, classes: tuple[type, ...]) -> bool:
    """Whether an intercepted call runs the `__call__` that one of these Linen classes defines.

    Checked with: flax 0.12.8 and 0.12.12, where `context.orig_method` is a `functools.partial`.
    Why: a lifted class, such as `nn.vmap(nn.BatchNorm)`, has the method's name too, and binds the
    axis before it calls the one of Flax; only the code objects tell them apart.
    Without it: the axis name of a lifted layer is left out although it is bound.
    """
    method = getattr(context.orig_method, 'func', context.orig_method)
    codes = _codes(tuple(cls.__call__ for cls in classes))
    return isinstance(context.module, classes) and getattr(method, '__code__', None) in codes


def is_nowrap(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.nowrap`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `nowrap`.
    Why: there is no public question for it.
    Without it: helpers that are no methods of the model run as such in a bound model.
    """
    return hasattr(member, 'nowrap')


def is_compact(member: Any) -> bool:
    """Whether a member of a module's class is decorated with `nn.compact`.

    Checked with: flax 0.12.8 and 0.12.12, which sets the attribute `compact`.
    Why: there is no public question for it.
    Without it: a compact method that is called without variables gives Flax's message, not ours.
    """
    return hasattr(member, 'compact')


def is_constructed(module: Any) -> bool:
    """Whether Linen has finished the construction of a module, and guards its fields.

    Checked with: flax 0.12.8 and 0.12.12, whose `__post_init__` sets the attribute `_state`.
    Why: Linen says so to nobody.
    Without it: `self.training = False` in a method of a `knn.Module` has no effect, silently.
    """
    return '_state' in vars(module)


def run_setup(module: Any) -> None:
    """Runs the `setup` of a bound Linen module if it has not run.

    Checked with: flax 0.12.8 and 0.12.12, whose `Module.__dir__` does it; `_try_setup` is private.
    Why: setup is lazy, and there is no public way to ask for it.
    Without it: the parts that `setup` makes are missing among those of a bound model.
    """
    dir(module)


# ---- flax.nnx ------------------------------------------------------------------------------------


def subclass(kind: Any, call: Callable[..., Any]) -> Any:
    """Returns a class that does what a class of NNX modules does, but for `__call__`.

    Checked with: flax 0.12.8 and 0.12.12. A class keeps what NNX knows of it as `_pytree__*`.
    Why: NNX has no interceptors for methods. The base class is set afterwards, so that a user's
    `__init_subclass__` does not see a class of ours.
    Without it: NNX modules are neither recorded nor named in traces, and axis names stay.
    """
    from flax import nnx

    names = {'__call__': call, '__module__': kind.__module__, '__qualname__': kind.__qualname__}
    made: Any = type(kind)(kind.__name__, (nnx.Module,), names, pytree=kind._pytree__is_pytree)
    made.__bases__ = (kind,)
    for name in [name for name in vars(made) if name.startswith('_pytree__')]:
        delattr(made, name)  # What NNX has noted of this class; what counts is the base's.
    return made


def set_class(node: Any, kind: type) -> None:
    """Gives an NNX module another class, such as one of `subclass`.

    Checked with: flax 0.12.8 and 0.12.12.
    Why: NNX modules check assignments, and allow none of their class.
    Without it: as without `subclass`.
    """
    object.__setattr__(node, '__class__', kind)


def linen_module(bridge: Any) -> Any:
    """Returns the Linen module in an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, `to_nnx__module`.
    Why: the property `module` is deprecated, and warns.
    Without it: Linen modules within NNX models are not told whether they train.
    """
    return bridge.to_nnx__module


def set_linen_module(bridge: Any, module: Any) -> None:
    """Puts another Linen module into an `nnx.bridge.ToNNX`.

    Checked with: flax 0.12.8 and 0.12.12, `to_nnx__module`.
    Why: the property `module` cannot be set, and another bridge would have no variables.
    Without it: Linen modules within NNX models are not told whether they train.
    """
    bridge.to_nnx__module = module


def dimension_names(variable: Any) -> Any:
    """Returns the names that an NNX variable gives to its dimensions, None for none.

    Checked with: flax 0.12.8 and 0.12.12. The metadata has them as 'out_sharding'.
    Why: the properties of these names are deprecated, and warn.
    Without it: config.sharding finds no names of dimensions in NNX models.
    """
    return variable.get_metadata().get('out_sharding')


@contextlib.contextmanager
def allowing_sow() -> Iterator[None]:
    """Silences NNX's warning about `Module.sow` and `Module.perturb` outside of `nnx.capture`.

    Checked with: flax 0.12.8 and 0.12.12, whose texts begin with "Using 'Module.".
    Why: `nnx.capture` breaks scans and bridges, so it cannot be used as the warning asks.
    Without it: each call of a model that sows prints a deprecation warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r"\s*Using 'Module\.", DeprecationWarning)
        yield
