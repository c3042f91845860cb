# SPDX-License-Identifier: Apache-2.0
"""Gradients of the loss with respect to intermediate values: `--mode=grad_probe`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from trainer.config.columns import align_columns
from trainer.config.errors import UserError
from trainer.inspect.forward import Batch, Forward
from trainer.inspect.statistics import float_leaves
from trainer.modules.patterns import compile_pattern
from trainer.modules.recorder import ROOT, ModuleRecorder, output_name, output_number
from trainer.parallel.host import fetch
from trainer.step.state import TrainState
from trainer.tasks.runner import loss_sums, safe_inverse
from trainer.tasks.task import TaskOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient with respect to one value.

    Attributes:
        path: path of the module whose output the value is, or its name in `self.perturb`.
        gradient: gradient of the loss, in the shape of the value, with a leading dimension for each
            enclosing scan. For a module that is called several times, the sum over the calls;
            calls with outputs of another shape have their own entry ('embed#1').
        value_norm: L2 norm of the value over these calls; None for a value of `self.perturb`.
    """

    path: str
    gradient: np.ndarray
    value_norm: float | None

    @property
    def norm(self) -> float:
        """The L2 norm of the gradient."""
        # Half precision would overflow.
        dtype = np.complex64 if np.iscomplexobj(self.gradient) else np.float32
        return float(np.linalg.norm(self.gradient.astype(dtype).ravel()))


def gradients(
    forward: Forward, state: TrainState, batch: Batch, match: Sequence[str] = ()
) -> list[Gradient]:
    """Returns the gradients of the loss of a train step, in the order of the calls.

    Under `config.accumulate` the loss is that of the first micro-batch. Several losses are summed.

    Args:
        forward: the forward pass of the train step.
        state: the train state, for its variables.
        batch: arrays (examples, ...).
        match: patterns of module paths, whose outputs are added to the values that the model names
            with `self.perturb`.

    Raises:
        UserError: if no value matches.
    """
    patterns = [compile_pattern(pattern, '--match') for pattern in match]
    state = dataclasses.replace(state, metrics=None)

    def wants(path: str) -> bool:
        return any(pattern.fullmatch(path or ROOT) for pattern in patterns)

    def perturbations(state: TrainState, batch: Batch) -> Any:
        recorder = ModuleRecorder(selects=wants, perturbations={})
        forward(recorder, state, batch, micro_batches=1)
        # A list outside of the traced function: names are not arrays, so they cannot be returned.
        called.extend(recorder.called)
        return recorder.perturbations

    def run(state: TrainState, batch: Batch) -> Any:
        def loss(perturbations: Any) -> Any:
            recorder = ModuleRecorder(_squares, selects=wants, perturbations=perturbations)
            (output,) = forward(recorder, state, batch, micro_batches=1)
            return _loss(output), recorder.records

        # Zeros are added to the values: they change nothing, and the gradient with respect to them
        # is that of the values.
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.grad(loss, has_aux=True)(zeros)

    called: list[str] = []
    shapes = forward.shapes(perturbations, state, batch)
    if not jax.tree.leaves(shapes):
        raise UserError(_no_values_message(match, called))
    grads, records = fetch(forward.compile(run)(state, batch))
    return _to_gradients(grads, records)


def table(gradients: Sequence[Gradient]) -> str:
    """Returns a table with path, shape, norm of value and norm of gradient."""
    rows = [('path', 'shape', 'norm of value', 'norm of gradient')]
    for each in gradients:
        shape = ' x '.join(map(str, each.gradient.shape)) or 'scalar'
        value = '-' if each.value_norm is None else f'{each.value_norm:.5g}'
        rows.append((each.path, shape, value, f'{each.norm:.5g}'))
    return '\n'.join(align_columns(rows, right=(2, 3)))


def _loss(output: TaskOutput) -> jax.Array:
    totals, weights, penalty = loss_sums(output)
    return sum((totals[name] * safe_inverse(weights[name]) for name in totals), penalty)


def _squares(output: Any, inputs: Any, variables: Any) -> dict[str, jax.Array]:
    # In float32: squares of half precision overflow early.
    arrays = enumerate(x for _, x in float_leaves(output))
    return {output_name(i, x): jnp.sum(jnp.square(x.astype(jnp.float32))) for i, x in arrays}


def _to_gradients(grads: Any, records: list[Any]) -> list[Gradient]:
    """Returns the gradients in the order of the calls, with the norms of the values.

    Args:
        grads: gradients with respect to the perturbations, a nested dict.
        records: the recorded calls, with the sums of squares of the outputs.
    """
    squares: dict[str, dict[str, float]] = {}
    orders: dict[str, int] = {}
    for path, record in ((p, r) for call in records for p, each in call.items() for r in each):
        orders.setdefault(path, int(np.min(record['order'])))
        # Summed over all layers of a scan and over all calls.
        sums = squares.setdefault(path, {})
        for name, x in record['value'].items():
            sums[name] = sums.get(name, 0.0) + float(np.sum(x))
    ordered = []
    for keys, gradient in traverse_util.flatten_dict(dict(grads)).items():
        *parents, name = map(str, keys)
        path = '/'.join(parents)
        number = output_number(name)
        if number is not None:
            several = f'/{number}' if len({output_number(n) for n in squares[path]}) > 1 else ''
            shape = [n for n in squares[path] if output_number(n) == number].index(name)
            # The number of the output is only in the name if there are several, that of the shape
            # only if calls differ in it.
            label = f'{path or ROOT}{several}' + (f'#{shape}' if shape else '')
            norm: float | None = math.sqrt(squares[path][name])
            order: tuple[float, int] = (orders[path], number)
        else:
            # Values of `self.perturb` come last: neither their order nor their norm is recorded.
            label, norm, order = '/'.join((*parents, name)), None, (math.inf, 0)
        entry = Gradient(path=label, gradient=np.asarray(gradient), value_norm=norm)
        ordered.append((order, label, entry))
    return [entry for *_, entry in sorted(ordered, key=lambda item: item[:2])]


def _no_values_message(match: Sequence[str], called: Sequence[str]) -> str:
    if called:
        return (
            f'{", ".join(dict.fromkeys(called))}: inside a branch of nn.cond or nn.switch, or '
            "inside a lifted module (nn.scan, nn.vmap) without the collection 'perturbations': "
            "give that one variable_axes={'perturbations': 0, 'intermediates': 0, ...}"
        )
    if not match:
        return (
            'the model names no value with self.perturb; select the outputs of modules with '
            "--match: --match='.*' selects all"
        )
    return (
        'the model names no value with self.perturb, and no module path matches '
        f'{", ".join(map(repr, match))}. A pattern must match a whole path; --mode=summary lists '
        "the modules, and --match='.*' selects all"
    )
