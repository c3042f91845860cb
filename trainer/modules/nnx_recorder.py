# SPDX-License-Identifier: Apache-2.0
"""A tap on the modules of NNX: see `trainer.modules.recorder`.

`nnx.capture(method_outputs=...)` would do it but for scans and bridges, which it breaks.
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
from trainer.modules.recorder import NAME, Tap

_current: contextvars.ContextVar[Tap] = contextvars.ContextVar('tap')
# How many branches and loops there are around the call of the whole model.
_loops_outside: contextvars.ContextVar[int] = contextvars.ContextVar('loops')

# What traces branches and loops.
_LOOPS = tuple(
    getattr(system, name)
    for system in (nnx, jax.lax)
    for name in ('cond', 'switch', 'while_loop', 'fori_loop')
)


class Names(Tap):
    """Records nothing: what a module computes carries its name in traces, as Linen has it."""

    @contextlib.contextmanager
    def calling(self, path: str, kind: type) -> Iterator[None]:
        """Is around a call, in the scope 'norm' or 'layers_0', or of the model's class."""
        last = re.search(r'[^/]+(/\d+)*$', path)
        with jax.named_scope(last[0].replace('/', '_') if last else kind.__name__):
            yield


def watch(module: nnx.Module, tap: Tap) -> contextlib.AbstractContextManager[None]:
    """Makes the module and its parts tell the tap of their calls; returns the context to call in.

    Args:
        module: a copy of its own: the classes of its parts are replaced.
        tap: gets what they record.
    """
    parts = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    for path, node in parts.items():
        name = '/'.join(map(str, path))
        if tap.wants(name) and _is_callable(type(node)):
            compat.set_class(node, _watched(type(node), name))
    for path, value in traverse_util.flatten_dict(tap.perturbations or {}).items():
        setattr(parts[path[:-1]], path[-1], nnx.Perturbation(value))
    return _using(tap)


def take_perturbations(module: nnx.Module, tap: Tap) -> None:
    """Moves what the call has perturbed out of the module."""
    tap.perturb_more(nnx.to_pure_dict(nnx.pop(module, nnx.Perturbation)))


@contextlib.contextmanager
def _using(tap: Tap) -> Iterator[None]:
    token, loops = _current.set(tap), _loops_outside.set(_loops())
    try:
        yield
    finally:
        _current.reset(token)
        _loops_outside.reset(loops)


def _is_callable(kind: type) -> bool:
    # Not hasattr: every class has the `__call__` that makes its instances.
    return any('__call__' in vars(base) for base in kind.__mro__)


@functools.cache
def _watched(kind: Any, path: str) -> Any:
    """Returns a class that does what `kind` does, and tells the tap.

    The class knows the path: within a scan nobody else does.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tap = _current.get()
        # As the call finds them: it may change statistics.
        variables = nnx.to_pure_dict(nnx.state(self, nnx.Not(nnx.Intermediate)))
        with tap.calling(path, kind):
            output = kind.__call__(self, *args, **kwargs)
        if _loops() > _loops_outside.get():
            return output
        # Within a transform of JAX itself, such as `jax.checkpoint`, a module takes nothing up.
        with contextlib.suppress(TraceContextError):
            if tap.perturbations is not None:
                output = tap.perturbed(output, self.perturb)
            record = tap.record(output, (args, kwargs), variables)
            if record is not None:
                before = getattr(self, NAME).get_value() if hasattr(self, NAME) else ()
                setattr(self, NAME, nnx.Intermediate((*before, record)))
        return output

    return compat.subclass(kind, call)


def _loops() -> int:
    """Returns how many branches and loops are being traced, one within the other.

    All branches must leave the same behind, and a loop what it has found, so a tap leaves nothing
    in any. A scan may.
    """
    return compat.num_open_calls(_LOOPS)
