# SPDX-License-Identifier: Apache-2.0
"""Records the outputs of modules during a call, and the gradients with respect to them.

Records are computed in the traced program and leave it in Flax's own collections. So they pass
through `jit`, `remat` and scans that pass on 'intermediates' and 'perturbations'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from trainer import compat

# Name of the recorder's own entries among those that modules sow and perturb.
NAME = '_recorder'
# Prefix of its name scopes, which assign the operations of a jaxpr to modules.
SCOPE = 'recorder:'
# Displayed for the whole model, whose path is empty.
ROOT = '(model)'
INTERMEDIATES, PERTURBATIONS = 'intermediates', 'perturbations'

_BRANCHES = (nn.cond, nn.switch)

# observe(output, inputs, variables) -> record of a call, a pytree of arrays.
Observe = Callable[[Any, Any, Any], Any]


class ModuleRecorder:
    """Records each call of each module of a model, and can add perturbations to their outputs.

    Attributes:
        records: the records of the modules by path, one dict for each call of the model.
        sown: the values that the modules sowed themselves, in the same form.
        called: the class name of each module that was called, by path. A module whose path is
            missing in `records` is in a branch, or in a lifted module that does not pass on
            'intermediates'.
        perturbations: values to add to those that a module passes to `self.perturb`, and to the
            outputs of the selected modules; None adds nothing. Nested dicts by path; missing values
            are zero, and are inserted by the call.
    """

    def __init__(
        self,
        observe: Observe | None = None,
        *,
        selects: Callable[[str], bool] = lambda path: True,
        perturbations: dict[str, Any] | None = None,
    ):
        """Starts without records.

        Args:
            observe: computes the record of a call; None records nothing.
            selects: whether to record a module, by its path ('' is the model).
            perturbations: see the attribute.
        """
        self.records: list[dict[str, Any]] = []
        self.sown: list[dict[str, Any]] = []
        self.called: dict[str, str] = {}
        self.perturbations = perturbations
        self._observe = observe
        self._selects = selects
        self._order = 0

    @property
    def collections(self) -> tuple[str, ...]:
        """The collections that must be mutable in a call of a Linen module."""
        return (INTERMEDIATES,) if self.perturbations is None else (INTERMEDIATES, PERTURBATIONS)

    def selects(self, path: str) -> bool:
        """Whether the module at a path is recorded."""
        return self._selects(path)

    @contextlib.contextmanager
    def intercept_linen(self) -> Iterator[None]:
        """Records the Linen modules that are called in the block."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        path = '/'.join(map(str, module.path))
        if context.method_name != '__call__' or not self._selects(path):
            return next_fun(*args, **kwargs)
        # Copied before the call, which may update statistics.
        variables = {
            name: jax.tree.map(lambda x: x, value)
            for name, value in module.variables.items()
            if name not in (INTERMEDIATES, PERTURBATIONS)
        }
        with self.module_scope(path, type(module)):
            output = next_fun(*args, **kwargs)
        # All branches of `nn.cond` must change the same collections, so record in none of them.
        if compat.num_open_calls(_BRANCHES):
            return output
        if self.perturbations is not None:
            output = self.perturb_output(output, lambda name, x: module.perturb(name, x))
        record = self.record(output, (args, kwargs), variables)
        if record is not None:
            module.sow(INTERMEDIATES, NAME, record)
        return output

    @contextlib.contextmanager
    def module_scope(self, path: str, kind: type) -> Iterator[None]:
        """Adds a module to `called`, and traces the block in a scope named by its path."""
        self.called.setdefault(path, kind.__name__)
        # JAX splits a name stack at slashes, so the path has another separator.
        with jax.named_scope(f'{SCOPE}{path.replace("/", "|")}'):
            yield

    def record(self, output: Any, inputs: Any, variables: Any) -> Any:
        """Returns the record of a call of a module, None for nothing."""
        if self._observe is None:
            return None
        # Collections have no order, so each record has the number of its call.
        order, self._order = self._order, self._order + 1
        return {'order': jnp.int32(order), 'value': self._observe(output, inputs, variables)}

    def perturb_output(self, output: Any, add: Callable[[str, Any], Any]) -> Any:
        """Returns the output of a module with `add(output_name(i, x), x)` for each float array."""
        leaves, structure = jax.tree.flatten(output)
        number = itertools.count()
        added = [add(output_name(next(number), x), x) if is_float(x) else x for x in leaves]
        return jax.tree.unflatten(structure, added)

    def add_perturbations(self, new: Mapping[str, Any]) -> None:
        """Adds the perturbations that a call has created."""
        if self.perturbations is not None:
            flat = traverse_util.flatten_dict(self.perturbations)
            flat.update(traverse_util.flatten_dict(dict(new)))
            self.perturbations = traverse_util.unflatten_dict(flat)

    def remember(self) -> Callable[[], None]:
        """Returns a function that removes everything that is recorded after this call."""
        records, sown, called = list(self.records), list(self.sown), dict(self.called)
        perturbations, order = self.perturbations, self._order

        def forget() -> None:
            # In place, because callers may already have references to these objects.
            self.records[:], self.sown[:] = records, sown
            self.called.clear()
            self.called.update(called)
            self.perturbations, self._order = perturbations, order

        return forget

    def take_records(self, intermediates: Mapping[str, Any]) -> dict[str, Any]:
        """Moves the recorder's entries out of the intermediates of a call; returns the rest."""
        records, sown = {}, {}
        for path, value in traverse_util.flatten_dict(dict(intermediates)).items():
            if path[-1] == NAME:
                records['/'.join(map(str, path[:-1]))] = value
            else:
                sown[path] = value
        self.records.append(records)
        self.sown.append({'/'.join(map(str, path)): value for path, value in sown.items()})
        return traverse_util.unflatten_dict(sown)


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """The record of one call of one module, on the host.

    Attributes:
        path: path of the module, '' for the model.
        name: the path, with the index of the layer in a scan over layers ('blocks/mlp[3]'), and
            with the index of the call if there are several ('mlp#1').
        value: what was recorded for the call: arrays, or a tree of arrays.
    """

    path: str
    name: str
    value: Any


def order_records(calls: list[dict[str, Any]]) -> list[CallRecord]:
    """Returns records, fetched from the devices, in call order.

    Layers of a scan follow one another, each with all of its modules.

    Args:
        calls: records by path for each call of the model: see `ModuleRecorder.records`.
    """
    stacks = []
    for path, records in ((p, r) for call in calls for p, each in call.items() for r in each):
        order = np.asarray(records['order'])
        stacks.append((int(order.min()), order.shape, path, records['value']))
    keyed, region, last_shape = [], 0, ()
    names: dict[str, int] = {}
    for first, shape, path, values in sorted(stacks, key=lambda stack: stack[0]):
        # A scan traces its body once, so all of its layers have the same order. Consecutive calls
        # with the same shape are in the same scan, a region, which is ordered by layer first.
        region, last_shape = region + (shape != last_shape), shape
        number = names[path] = names.get(path, -1) + 1
        name = (path or ROOT) + (f'#{number}' if number else '')
        for index in np.ndindex(shape):
            label = name + (f'[{", ".join(map(str, index))}]' if index else '')
            one = jax.tree.map(lambda x, at=index: np.asarray(x)[at], values)
            keyed.append(((region, index, first), CallRecord(path, label, one)))
    return [record for _, record in sorted(keyed, key=lambda item: item[0])]


def output_name(number: int, x: jax.Array) -> str:
    """Returns the name of the perturbation of an output of a module.

    It contains the shape ('_recorder_0_32_10'), because calls of one module may return different
    shapes.

    Args:
        number: index of the output among those of the call.
        x: the output.
    """
    return '_'.join([NAME, str(number), *map(str, x.shape)])


def output_number(name: str) -> int | None:
    """Returns the number in a name made by `output_name`, None for any other name."""
    match = re.match(rf'{NAME}_(\d+)', name)
    return int(match[1]) if match else None


def is_float(x: Any) -> bool:
    """Whether a value is a floating-point array: it can be non-finite, and has gradients."""
    return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)
