# SPDX-License-Identifier: Apache-2.0
"""Every reliance on private parts or message texts of a library, each in a function of its own.

Each function says which version it was checked with, why there is no public way, and what breaks
without it; tests/test_compat.py names the one that a new version breaks. A function that reads a
message returns False, None or the whole text where the wording is another: then an error is shown
as the library words it, and nothing else changes.

The text of a compiled program, which `jax.stages.Compiled.as_text` makes, is read in
modes/plan/collectives.py alone. No library is imported before a function needs it: a command line
with a mistake in it is answered without JAX.
"""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils import epath

# ---- jax ---------------------------------------------------------------------------------------


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service; None before `jax.distributed` has started.

    Its `key_value_set(key, text)` and `blocking_key_value_get(key, timeout_ms)` are used.

    Checked with jax 0.10.2 and 0.12.0. `jax.distributed` starts the service and offers no values
    in it. Without it a process cannot tell the others where its peer watch listens.
    """
    from jax._src import distributed

    return distributed.global_state.client


def coordinator_address() -> str:
    """Returns 'host:port' of JAX's coordination service; '' before it has started.

    Checked with jax 0.10.2 and 0.12.0. Where JAX has detected the cluster itself, it tells nobody
    the address. Without it the peer watch falls back on this host's name, which other hosts may not
    be able to resolve.
    """
    from jax._src import distributed

    return str(distributed.global_state.coordinator_address or '')


def tpu_vm_processes() -> int:
    """Returns the number of hosts of the TPU slice that this machine belongs to; 1 elsewhere.

    A Cloud TPU VM has no variable that says so; JAX asks its metadata server.

    Checked with jax 0.10.2 and 0.12.0. `jax.distributed.initialize` detects the cluster, but fails
    where there is none. Without it a multi-host TPU trains as so many separate runs unless the
    processes are declared by flags.
    """
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    except ImportError:
        return 1
    return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the runtime failed for want of memory.

    Checked with jax 0.10.2 and 0.12.0. A `JaxRuntimeError` has no status code; the CPU backend
    does not even write one into its text. Without it such an error is a traceback.
    """
    return 'RESOURCE_EXHAUSTED' in str(error) or 'Out of memory' in str(error)


def runtime_reason(error: BaseException) -> str:
    """Returns a runtime error's first line without its status: 'Out of memory allocating ...'.

    Checked with jax 0.10.2 and 0.12.0, whose text is 'STATUS: what failed: why'; see
    `is_out_of_memory`. Without it a message repeats the status.
    """
    return (str(error).splitlines() or [''])[0].split(': ')[-1]


def is_deleted_array(error: BaseException) -> bool:
    """Whether JAX refused an array whose buffer was donated or deleted.

    Checked with jax 0.10.2 and 0.12.0, which raise a RuntimeError or a ValueError, with one text
    for an argument of a function and another for an array that is read. `Array.is_deleted` answers
    for an array at hand, and the error does not hold it. Without it the advice on donated states
    is missing.
    """
    text = r'(?:Array|Buffer) has been deleted|deleted or donated'
    return isinstance(error, (RuntimeError, ValueError)) and re.search(text, str(error)) is not None


def unknown_mesh_axis(error: BaseException) -> str | None:
    """Returns the axis that an annotation names and the mesh does not have.

    Checked with jax 0.10.2 and 0.12.0. JAX raises a ValueError without fields. Without it the
    advice to add the axis to `config.mesh` is missing.
    """
    found = re.search(r'Resource axis: (\w+) of .* is not found in mesh', str(error))
    return found[1] if found else None


def unbound_axis(error: BaseException) -> str | None:
    """Returns the axis of a collective that no transformation has bound.

    Checked with jax 0.10.2 and 0.12.0. JAX raises a NameError whose `name` is not set. Without it
    the advice for models written for `jax.pmap` is missing.
    """
    found = re.search(r'unbound axis name: (\w+)', str(error))
    return found[1] if found and isinstance(error, NameError) else None


def wrong_rank(error: BaseException) -> tuple[str, int] | None:
    """Returns the spec of a sharding for more dimensions than the array has, and their number.

    Checked with jax 0.10.2 and 0.12.0. JAX raises a ValueError without fields. Without it the
    message does not say that the names belong around the reshaped parameter.
    """
    text = r'.*spec=(.*)\) is only valid for values of rank .* a value of rank (\d+)'
    found = re.search(text, str(error))
    return (found[1], int(found[2])) if found else None


def refuses_type(error: BaseException, kind: type) -> bool:
    """Whether JAX says that it takes no value of this class.

    Checked with jax 0.10.2 and 0.12.0. The TypeError has no fields; its text names the class.
    Without it a task that computes with a field that stays on the host gets JAX's own message,
    which does not name the field.
    """
    return isinstance(error, TypeError) and kind.__name__ in str(error)


def is_note_on_frames(note: str) -> bool:
    """Whether a note of an error is JAX's, which says that it has hidden its own frames.

    Checked with jax 0.10.2 and 0.12.0. `JAX_TRACEBACK_FILTERING=off` drops the note and shows the
    frames. Without it the note is printed below each error message.
    """
    return 'JAX has removed its internal frames' in note


def name_stack(equation: Any) -> str:
    """Returns the named scopes of an equation of a jaxpr, from the outside in: 'jvp(a)/b'.

    Checked with jax 0.10.2 and 0.12.0. `jax.named_scope` is public, and what it leaves in a jaxpr
    is not documented. Without it operations cannot be attributed to modules: --mode=summary counts
    none, and no one is warned of float32 in a model that should compute in half precision.
    """
    return str(equation.source_info.name_stack)


# ---- jax and flax ------------------------------------------------------------------------------


def is_initializer(value: Any) -> bool:
    """Whether a value is an initializer of JAX or Flax, or one that a function there has made.

    Checked with jax 0.10.2 and 0.12.0, flax 0.12.8 and 0.12.12. An initializer is a mere function,
    defined in a private module of JAX or a public one of Flax. Without it a config that holds one
    is refused with less advice, and a word is not understood as the name of one.
    """
    module = getattr(value, '__module__', None) or ''
    return callable(value) and module.endswith(('nn.initializers', 'linen.initializers'))


# ---- optax, and the texts of Python that it leads to -------------------------------------------


def missing_arguments(error: BaseException) -> str | None:
    """Returns the names of the arguments that an optimizer's update was not given, as Python says.

    Checked with optax 0.2.8 and Python 3.11 to 3.13. `optax.GradientTransformationExtraArgs` does
    not say which arguments it needs. Without it the advice to pass them in a step is missing.
    """
    text = r'update\w*\(\) missing \d+ required [\w-]+ arguments?: (.*)'
    found = re.search(text, str(error))
    return found[1].replace("'", '') if found and isinstance(error, TypeError) else None


def refused_argument(error: BaseException) -> str | None:
    """Returns the name of the extra argument that an optimizer's update does not take.

    Checked with optax 0.2.8 and Python 3.11 to 3.13. The signatures inside a chain are hidden.
    Without it an optimizer that takes no extra arguments fails inside a chain.
    """
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found[1] if found and isinstance(error, TypeError) else None


def is_of_optax(error: BaseException) -> bool:
    """Whether optax raised an error, or called the function of JAX that did.

    Checked with optax 0.2.8. Its errors have no class of their own, so the frames have to say.
    Without it a mistake in the optimizer's config is a traceback.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get('__name__')).partition('.')[0] for frame, _ in frames]
    outside = [name for name in modules if name not in ('jax', 'jaxlib', 'numpy', 'functools')]
    return bool(outside) and outside[-1] in ('optax', 'chex')


# ---- clu ---------------------------------------------------------------------------------------


def is_own_field(name: str) -> bool:
    """Whether a field of a `clu.metrics.Collection` is the library's own, and no metric.

    Checked with clu 0.0.12, whose collections count their reductions in a field. It has no list of
    its metrics other than the annotations of the class, where those of `create` are not. Without
    it the counter is treated as a metric.
    """
    return name == '_reduction_counter'


# ---- orbax and tensorstore ---------------------------------------------------------------------


def is_orbax_committed(step_directory: epath.Path) -> bool:
    """Whether a save with `AtomicityMode.COMMIT_FILE` has ended: its last act is to write a file.

    Checked with orbax-checkpoint 0.12.8. `ocp.utils.is_checkpoint_finalized` takes a directory
    without that file for finished on a local disk, and importing Orbax takes a second. Without it
    no checkpoint is found.
    """
    return (step_directory / 'commit_success.txt').exists()


def is_orbax_tree(directory: epath.Path) -> bool:
    """Whether Orbax has written a tree of arrays into a directory, in any of its versions.

    Checked with orbax-checkpoint 0.12.8. A handler can only try to read. Without it
    `config.init_from` does not find checkpoints that others have written.
    """
    names = ('_METADATA', 'manifest.ocdbt', '_sharding')
    return any((directory / name).exists() for name in names)


def is_orbax_array(directory: epath.Path) -> bool:
    """Whether `ocp.ArrayCheckpointHandler` has written a bare array into a directory.

    Checked with orbax-checkpoint 0.12.8; otherwise as `is_orbax_tree`.
    """
    return (directory / 'checkpoint' / '.zarray').exists()


def orbax_notes(step_directory: epath.Path) -> epath.Path:
    """Returns the file with Orbax's own notes about a step, such as when it was saved.

    Checked with orbax-checkpoint 0.12.8. Orbax reads it at each save, and has no way to check or
    to rewrite it. Without it a damaged one fails all saves of a run that resumes.
    """
    return step_directory / '_CHECKPOINT_METADATA'


def orbax_notes_fields() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the objects and of the times in `orbax_notes`.

    Checked with orbax-checkpoint 0.12.8. Orbax fails if one of them is of another kind. Without it
    as `orbax_notes`.
    """
    objects = 'metrics', 'performance_metrics', 'custom_metadata'
    return objects, ('init_timestamp_nsecs', 'commit_timestamp_nsecs')


def synchronous_directories() -> Any:
    """Returns the `ocp.AsyncOptions` with which a save makes its directories before it returns.

    Otherwise all other threads of a save wait five minutes for a directory that could not be
    created, and the interpreter waits for them.

    Checked with orbax-checkpoint 0.12.8, which plans to remove this option. Without it a save to a
    full or missing disk ends the process some minutes late.
    """
    import orbax.checkpoint as ocp

    name = 'create_directories_asynchronously'
    known = name in {field.name for field in dataclasses.fields(ocp.AsyncOptions)}
    return ocp.AsyncOptions(**{name: False} if known else {})


def commit_future(write: Any, name: str) -> Any:
    """Returns the future of a handler's write, which begins when the directory is there.

    Checked with orbax-checkpoint 0.12.8. The class is exported and not documented; `ocp.future`
    has no other one that waits for the directory. Without it nothing can be saved.

    Args:
        write: a coroutine.
        name: of the write, for Orbax's log.
    """
    from orbax.checkpoint import future

    return future.CommitFutureAwaitingContractedSignals(write, name=name)


def os_error_number(error: BaseException) -> int | None:
    """Returns the number of the operating system's error, such as `errno.ENOSPC`.

    Checked with tensorstore 0.1.86, whose ValueError has the number in its text only. Without it
    a failed write that may pass by itself ends the run.
    """
    in_text = re.search(r"os_error_code='(\d+)'", str(error))
    return int(in_text[1]) if in_text else getattr(error, 'errno', None)


def without_details(error: BaseException) -> str:
    """Returns the first line of an error's text, without the page that TensorStore adds to it.

    Checked with tensorstore 0.1.86, whose ValueErrors end in details such as " [source
    locations='...']". Without it a message about a damaged checkpoint is a page long.
    """
    return re.split(r"\n| \[[\w ]+='| See full TensorStore", str(error), maxsplit=1)[0]


# ---- ml_collections ----------------------------------------------------------------------------


def reference_inputs(reference: Any) -> Iterator[Any]:
    """Yields what an `ml_collections.FieldReference` is computed from: references and values.

    Checked with ml_collections 1.1.0. A reference offers its value and no way back to its inputs.
    Without it a key of `config.vars` cannot be seen to be used, and each one is refused.
    """
    yield reference._value  # The reference that an operation started from.
    for operation in reference._ops:
        yield from operation.args


def is_dotted_key(error: BaseException) -> bool:
    """Whether a ConfigDict refused a key with a dot in it.

    Checked with ml_collections 1.1.0, which raises a ValueError like any other. Without it the
    advice to nest dicts is missing.
    """
    return 'dots in field names' in str(error)


def is_other_type(error: BaseException) -> bool:
    """Whether a ConfigDict refused a value of another type than the one before.

    Checked with ml_collections 1.1.0, which raises a TypeError like any other. Without it the
    advice on objects in a config is missing.
    """
    return isinstance(error, TypeError) and 'Could not override field' in str(error)


# ---- tensorboardX ------------------------------------------------------------------------------


def tensorboard_events() -> tuple[Any, Any, Any]:
    """Returns tensorboardX's writer of events, and the modules of its events and summaries.

    Checked with tensorboardX 2.6.5. `SummaryWriter` makes an event for each value, ten times the
    work, and writes in a thread whose queue blocks for ever once a full disk has ended it. Without
    it there are no event files; `metrics.jsonl` has all rows.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    return EventsWriter, event_pb2, summary_pb2
