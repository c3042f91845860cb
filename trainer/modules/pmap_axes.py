# SPDX-License-Identifier: Apache-2.0
"""Runs normalization layers that name an axis of `jax.pmap` in a program without that axis.

Under `pmap` each device sees its shard of the batch, and `BatchNorm(axis_name='batch')` averages
the statistics over the shards. A step is one program over the whole batch, whose statistics already
equal that average. So the name is omitted in the call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax

from trainer import compat
from trainer.config.errors import UserError

_log = logging.getLogger('trainer')

_current: contextvars.ContextVar[PmapAxes] = contextvars.ContextVar('pmap_axes')

_NORMS = ('BatchNorm', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm')
LINEN_NORMS = tuple(getattr(nn, name) for name in _NORMS)


class PmapAxes:
    """Omits axis names of `pmap` in normalization layers, and warns once for each name."""

    def __init__(self) -> None:
        self._warned: set[Any] = set()
        # The NNX layers that were called without their axis.
        self._paths: set[str] = set()

    def remove_axes(self, module: Any) -> None:
        """Removes the axes from the layers of an NNX module that were called without them."""
        for path, node in _norms_with_axes(module):
            if path in self._paths:
                node.axis_name = None

    @contextlib.contextmanager
    def intercept_calls(self) -> Iterator[None]:
        """Omits missing axes in all calls of models in the block."""
        # For NNX layers: the calls of the classes from `omit_in_nnx` look it up.
        token = _current.set(self)
        try:
            with nn.intercept_methods(self.intercept):
                yield
        finally:
            _current.reset(token)

    @contextlib.contextmanager
    def omit_axes(self, module: Any, path: str) -> Iterator[list[Any]]:
        """Omits the axis names of a normalization layer that are not bound, within the block.

        Yields:
            The omitted names.

        Raises:
            UserError: if the module averages over groups of devices.
        """
        axis_name = module.axis_name
        names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
        missing = [name for name in names if _is_missing(name)]
        if not missing:
            yield missing
            return
        where = f'{path or "the model"} ({type(module).__name__})'
        if module.axis_index_groups is not None:
            # Groups compute other statistics than the whole batch: ignoring them changes results.
            raise UserError(
                f'config.model: {where} normalizes over groups of devices (axis_index_groups='
                f'{module.axis_index_groups!r}) of the jax.pmap axis {missing[0]!r}, which does '
                'not exist: a step is one program over the whole batch. Remove axis_index_groups '
                'for statistics of the global batch, or use '
                'trainer.models.norm:GroupedBatchNorm for statistics of groups of examples'
            )
        self._warn_once(missing, where)
        # The axes that are bound, such as one of `nn.vmap` within the model, stay.
        rest = tuple(name for name in names if name not in missing)
        compat.set_attribute(module, 'axis_name', rest or None)
        try:
            yield missing
        finally:
            compat.set_attribute(module, 'axis_name', axis_name)

    def _warn_once(self, names: list[Any], where: str) -> None:
        new = [name for name in names if name not in self._warned]
        if new:
            self._warned.update(new)
            _log.warning(
                'config.model: %s names the jax.pmap axis %s, which does not exist. The name is '
                'ignored, here and in other normalization layers: a step is one program over the '
                'whole batch, so their statistics are those of the global batch',
                where,
                ', '.join(map(repr, new)),
            )

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Linen interceptor that omits missing axes in calls of normalization layers."""
        module = context.module
        names_axis = isinstance(module, LINEN_NORMS) and module.axis_name is not None
        # A lifted class, such as `nn.vmap(nn.BatchNorm, axis_name=...)`, overrides the method: it
        # binds the axis and then calls Flax's method, which is intercepted with the axis bound.
        if not names_axis or not compat.is_call_of(context, LINEN_NORMS):
            return next_fun(*args, **kwargs)
        with self.omit_axes(module, '/'.join(map(str, module.path))):
            return next_fun(*args, **kwargs)


@contextlib.contextmanager
def omit_in_nnx(module: Any) -> Iterator[None]:
    """Omits missing axes in the calls of an NNX module, within `PmapAxes.intercept_calls`."""
    norms = _norms_with_axes(module)
    kinds: list[Any] = [type(node) for _, node in norms]
    # By class, because NNX has no interceptors. Restored, because the class is part of the graph.
    try:
        for (path, node), kind in zip(norms, kinds, strict=True):
            compat.set_class(node, _class_without_axes(kind, path))
        yield
    finally:
        for (_, node), kind in zip(norms, kinds, strict=True):
            compat.set_class(node, kind)


def _norms_with_axes(module: Any) -> list[tuple[str, Any]]:
    """Returns the normalization layers of an NNX module that name an axis, by path."""
    from flax import nnx

    nodes: Iterable[tuple[Any, Any]] = nnx.iter_graph(module)
    return [
        ('/'.join(map(str, path)), node)
        for path, node in nodes
        if isinstance(node, _nnx_norms()) and node.axis_name is not None
    ]


@functools.cache
def _nnx_norms() -> Any:
    from flax import nnx

    return tuple(getattr(nnx, name) for name in _NORMS)


@functools.cache
def _class_without_axes(kind: Any, path: str) -> Any:
    """Returns a subclass of `kind` whose calls omit the names of missing axes.

    There is one for each path, which the warning shows: the module itself does not know it.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        axes = _current.get(None)
        if axes is None or self.axis_name is None:
            return kind.__call__(self, *args, **kwargs)
        with axes.omit_axes(self, path) as missing:
            # For `remove_axes`, which must not remove the axis of an `nnx.vmap` around the layer.
            if missing:
                axes._paths.add(path)
            return kind.__call__(self, *args, **kwargs)

    return compat.make_subclass(kind, call)


def _is_missing(name: Any) -> bool:
    """Whether an axis is neither bound by an enclosing transformation nor an axis of the mesh."""
    in_mesh = name in jax.sharding.get_abstract_mesh().axis_names
    return not in_mesh and not compat.is_axis_bound(name)
