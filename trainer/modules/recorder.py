# SPDX-License-Identifier: Apache-2.0
"""Looks into the calls of a model: what each module returns, and the gradient with respect to it.

A tap records inside the traced program, in Flax's own collections, so that it sees through `jit`,
`remat` and scans as far as these pass the collections 'intermediates' and 'perturbations' on.
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

# Under this name a tap keeps its own among what modules sow and perturb.
NAME = '_tap'
# And so begins the name of its scopes.
SCOPE = 'tap:'
# What the whole model is called, whose path is empty.
ROOT = '(model)'
INTERMEDIATES, PERTURBATIONS = 'intermediates', 'perturbations'

_BRANCHES = (nn.cond, nn.switch)

# look(output, inputs, variables) -> what is recorded of a call, a pytree of arrays.
Look = Callable[[Any, Any, Any], Any]


class Tap:
    """Records each call of each module of a model, and may add to what they return.

    Attributes:
        found: what the modules have recorded, by path, one dict for each call of the model.
        sown: what they have sown themselves, likewise.
        called: the class of each module that was called, by path. One whose path is missing in
            `found` is inside a lifted module that does not pass 'intermediates' on, or a branch.
        perturbations: what is added to values that a module names with `self.perturb`, and to the
            outputs of the modules that are wanted; None leaves them alone. Nested dicts by path;
            what is missing is zero, and put there.
    """

    def __init__(
        self,
        look: Look | None = None,
        *,
        wants: Callable[[str], bool] = lambda path: True,
        perturbations: dict[str, Any] | None = None,
    ):
        """Has recorded nothing yet.

        Args:
            look: what is recorded of a call; None for nothing.
            wants: whether a module is looked at, by its path ('' is the model).
            perturbations: see the attribute.
        """
        self.found: list[dict[str, Any]] = []
        self.sown: list[dict[str, Any]] = []
        self.called: dict[str, str] = {}
        self.perturbations = perturbations
        self._look = look
        self._wants = wants
        self._order = 0

    @property
    def collections(self) -> tuple[str, ...]:
        """The collections that a call of a Linen module must be able to change."""
        return (INTERMEDIATES,) if self.perturbations is None else (INTERMEDIATES, PERTURBATIONS)

    def wants(self, path: str) -> bool:
        """Whether the module at a path is looked at."""
        return self._wants(path)

    @contextlib.contextmanager
    def on_linen(self) -> Iterator[None]:
        """Looks at the Linen modules that are called meanwhile."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(
        self,
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        path = '/'.join(map(str, module.path))
        if context.method_name != '__call__' or not self._wants(path):
            return following(*args, **kwargs)
        # A copy, as the call finds them: it may change statistics.
        variables = {
            name: jax.tree.map(lambda x: x, value)
            for name, value in module.variables.items()
            if name not in (INTERMEDIATES, PERTURBATIONS)
        }
        with self.calling(path, type(module)):
            output = following(*args, **kwargs)
        # All branches must leave the same behind, so a tap leaves nothing in any.
        if compat.num_open_calls(_BRANCHES):
            return output
        if self.perturbations is not None:
            output = self.perturbed(output, lambda name, x: module.perturb(name, x))
        record = self.record(output, (args, kwargs), variables)
        if record is not None:
            module.sow(INTERMEDIATES, NAME, record)
        return output

    @contextlib.contextmanager
    def calling(self, path: str, kind: type) -> Iterator[None]:
        """Notes that a module is called; what is traced meanwhile has its path in its scope."""
        self.called.setdefault(path, kind.__name__)
        with jax.named_scope(f'{SCOPE}{path.replace("/", "|")}'):
            yield

    def record(self, output: Any, inputs: Any, variables: Any) -> Any:
        """Returns what is recorded of a call of a module, None for nothing."""
        if self._look is None:
            return None
        order, self._order = self._order, self._order + 1
        return {'order': jnp.int32(order), 'seen': self._look(output, inputs, variables)}

    def perturbed(self, output: Any, add: Callable[[str, Any], Any]) -> Any:
        """Returns the output of a module, each float array in it as `add(name_of(i, x), x)`."""
        leaves, structure = jax.tree.flatten(output)
        number = itertools.count()
        added = [add(name_of(next(number), x), x) if is_float(x) else x for x in leaves]
        return jax.tree.unflatten(structure, added)

    def perturb_more(self, made: Mapping[str, Any]) -> None:
        """Takes the perturbations that a call has made beside those that it was given."""
        if self.perturbations is not None:
            flat = traverse_util.flatten_dict(self.perturbations)
            flat.update(traverse_util.flatten_dict(dict(made)))
            self.perturbations = traverse_util.unflatten_dict(flat)

    def remember(self) -> Callable[[], None]:
        """Returns a function that removes everything recorded from here on."""
        found, sown, called = list(self.found), list(self.sown), dict(self.called)
        perturbations, order = self.perturbations, self._order

        def forget() -> None:
            # The same objects: readers may already hold references to them.
            self.found[:], self.sown[:] = found, sown
            self.called.clear()
            self.called.update(called)
            self.perturbations, self._order = perturbations, order

        return forget

    def keep(self, intermediates: Mapping[str, Any]) -> dict[str, Any]:
        """Takes its own out of what a call has left, and returns the rest."""
        found, sown = {}, {}
        for path, value in traverse_util.flatten_dict(dict(intermediates)).items():
            if path[-1] == NAME:
                found['/'.join(map(str, path[:-1]))] = value
            else:
                sown[path] = value
        self.found.append(found)
        self.sown.append({'/'.join(map(str, path)): value for path, value in sown.items()})
        return traverse_util.unflatten_dict(sown)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One call of one module, on the host.

    Attributes:
        path: of the module, '' for the model.
        name: the path, with the layer's number where layers are scanned over ('blocks/mlp[3]'), and
            the number of the call where there are several ('mlp#1').
        seen: what was recorded.
    """

    path: str
    name: str
    seen: Any


def in_order(found: list[dict[str, Any]]) -> list[Seen]:
    """Returns what was recorded, fetched from the devices, in the order of the calls.

    The layers of a scan come one after the other, each with all that is in it.
    """
    stacks = []
    for path, records in ((p, r) for call in found for p, each in call.items() for r in each):
        order = np.asarray(records['order'])
        stacks.append((int(order.min()), order.shape, path, records['seen']))
    timed, region, before = [], 0, ()
    names: dict[str, int] = {}
    for first, shape, path, seen in sorted(stacks, key=lambda stack: stack[0]):
        # Calls of the same stack of layers follow each other; any other call is outside.
        region, before = region + (shape != before), shape
        calls = names[path] = names.get(path, -1) + 1
        name = (path or ROOT) + (f'#{calls}' if calls else '')
        for index in np.ndindex(shape):
            label = name + (f'[{", ".join(map(str, index))}]' if index else '')
            one = jax.tree.map(lambda x, at=index: np.asarray(x)[at], seen)
            timed.append(((region, index, first), Seen(path, label, one)))
    return [seen for _, seen in sorted(timed, key=lambda item: item[0])]


def name_of(number: int, x: jax.Array) -> str:
    """Returns the name of what is added to the output of a module that has this number.

    The shape is in it ('_tap_0_32_10'): what a call returns in another shape is another value.
    """
    return '_'.join([NAME, str(number), *map(str, x.shape)])


def number_in(name: str) -> int | None:
    """Returns the number in such a name, None for another one."""
    found = re.match(rf'{NAME}_(\d+)', name)
    return int(found[1]) if found else None


def is_float(x: Any) -> bool:
    """Whether a value is an array that may hold what is not finite, and has gradients."""
    return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)
