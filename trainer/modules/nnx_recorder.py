# SPDX-License-Identifier: Apache-2.0
"""Records the calls of NNX modules: see `trainer.modules.recorder`.

Flax's own `nnx.capture(method_outputs=...)` does not work with scans and bridges.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx, traverse_util
from flax.errors import TraceContextError

from trainer import compat
from trainer.modules.recorder import NAME, ModuleRecorder

_current: contextvars.ContextVar[ModuleRecorder] = contextvars.ContextVar('recorder')
# Number of branches and loops around the call of the model: only those within it prevent recording.
_loops_outside: contextvars.ContextVar[int] = contextvars.ContextVar('loops')

# The functions that trace branches and loops.
_LOOPS = tuple(
    getattr(system, name)
    for system in (nnx, jax.lax)
    for name in ('cond', 'switch', 'while_loop', 'fori_loop')
)


class NameScopes(ModuleRecorder):
    """Records nothing, but names the operations of each module in traces, as Linen does."""

    @contextlib.contextmanager
    def module_scope(self, path: str, kind: type) -> Iterator[None]:
        """Traces the block in the scope 'norm' or 'layers_0', or that of the model's class."""
        last = re.search(r'[^/]+(/\d+)*$', path)
        with jax.named_scope(last[0].replace('/', '_') if last else kind.__name__):
            yield


def record_calls(
    module: nnx.Module, recorder: ModuleRecorder
) -> contextlib.AbstractContextManager[None]:
    """Makes the module and its submodules record their calls; returns the context to call them in.

    Args:
        module: changed in place: the classes of its submodules are replaced.
        recorder: receives the records.
    """
    # By class, because NNX has no interceptors and Python looks `__call__` up in the class.
    parts = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    for path, node in parts.items():
        name = '/'.join(map(str, path))
        if recorder.selects(name) and _is_callable(type(node)):
            compat.set_class(node, _recorded_class(type(node), name))
    for path, value in traverse_util.flatten_dict(recorder.perturbations or {}).items():
        setattr(parts[path[:-1]], path[-1], nnx.Perturbation(value))
    return _activate(recorder)


def take_perturbations(module: nnx.Module, recorder: ModuleRecorder) -> None:
    """Moves the perturbations that a call has created from the module to the recorder."""
    recorder.add_perturbations(nnx.to_pure_dict(nnx.pop(module, nnx.Perturbation)))


@contextlib.contextmanager
def _activate(recorder: ModuleRecorder) -> Iterator[None]:
    token, loops = _current.set(recorder), _loops_outside.set(_num_open_loops())
    try:
        yield
    finally:
        _current.reset(token)
        _loops_outside.reset(loops)


def _is_callable(kind: type) -> bool:
    # Not hasattr: every class has the `__call__` that creates its instances.
    return any('__call__' in vars(base) for base in kind.__mro__)


@functools.cache
def _recorded_class(kind: Any, path: str) -> Any:
    """Returns a subclass of `kind` that records its calls.

    There is one for each path, because a module does not know its path within a scan. Cached,
    because the class is a part of the graph: a new one would be a new program for `nnx.jit`.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _current.get()
        # Copied before the call, which may change statistics.
        variables = nnx.to_pure_dict(nnx.state(self, nnx.Not(nnx.Intermediate)))
        with recorder.module_scope(path, kind):
            output = kind.__call__(self, *args, **kwargs)
        if _num_open_loops() > _loops_outside.get():
            return output
        # NNX does not allow changes of modules within a transformation of JAX itself, such as
        # `jax.checkpoint`.
        with contextlib.suppress(TraceContextError):
            if recorder.perturbations is not None:
                output = recorder.perturb_output(output, self.perturb)
            record = recorder.record(output, (args, kwargs), variables)
            if record is not None:
                # A module may be called several times in a call of the model.
                records = getattr(self, NAME).get_value() if hasattr(self, NAME) else ()
                setattr(self, NAME, nnx.Intermediate((*records, record)))
        return output

    return compat.make_subclass(kind, call)


def _num_open_loops() -> int:
    """Returns the number of nested branches and loops that are being traced.

    Branches must have equal outputs, and loops must keep the structure of their state, so nothing
    can be recorded in them. A scan can return records.
    """
    return compat.num_open_calls(_LOOPS)
