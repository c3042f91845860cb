# SPDX-License-Identifier: Apache-2.0
"""A tap on the modules of NNX: see `trainer.modules.tap`.

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

from trainer.modules.tap import NAME, Tap

_current: contextvars.ContextVar[Tap] = contextvars.ContextVar('tap')


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
            object.__setattr__(node, '__class__', _watched(type(node), name))
    for path, value in traverse_util.flatten_dict(tap.perturbations or {}).items():
        setattr(parts[path[:-1]], path[-1], nnx.Perturbation(value))
    return _using(tap)


def take_perturbations(module: nnx.Module, tap: Tap) -> None:
    """Moves what the call has perturbed out of the module."""
    tap.perturb_more(nnx.to_pure_dict(nnx.pop(module, nnx.Perturbation)))


@contextlib.contextmanager
def _using(tap: Tap) -> Iterator[None]:
    token = _current.set(tap)
    try:
        yield
    finally:
        _current.reset(token)


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
        if tap.perturbations is not None:
            output = tap.perturbed(output, self.perturb)
        record = tap.record(output, (args, kwargs), variables)
        if record is not None:
            before = getattr(self, NAME).get_value() if hasattr(self, NAME) else ()
            setattr(self, NAME, nnx.Intermediate((*before, record)))
        return output

    names = {'__call__': call, '__module__': kind.__module__, '__qualname__': kind.__qualname__}
    return type(kind.__name__, (kind,), names)
