# SPDX-License-Identifier: Apache-2.0
"""`--mode=export`: writes a trained model for programs that know nothing of this one.

A directory holds the task's predictions as a function that any process with `jax` and `flatbuffers`
can call (StableHLO by `jax.export`, which reads its files with flatbuffers; for batches of any
size), and the variables as Flax's msgpack and as safetensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict
from jax import export
from jax.sharding import AxisType

from trainer.config.errors import UserError
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.prediction import Prediction
from trainer.evaluate.step import EMA
from trainer.modes.command import Command, restore, workdir_of
from trainer.observe import logfile
from trainer.observe.table import nbytes
from trainer.parallel.host import fetch
from trainer.parallel.sharding import named_axes
from trainer.parallel.signals import StopRequest
from trainer.run.workdir import versions
from trainer.step.state import TrainState
from trainer.tasks.runner import MASK
from trainer.trainer import Trainer
from trainer.weights import safetensors

FUNCTION = 'model.jax_export'
MSGPACK, SAFETENSORS = 'variables.msgpack', 'variables.safetensors'
ABOUT = 'export.json'

# All that a program must have installed to read the function and to call it.
REQUIRES = ('jax', 'flatbuffers')

# Variables of more bytes are an argument of the function and not a part of it: its file would hold
# them all once more, and no such file can be larger than 2 GiB.
MOST_WITHIN = 2**28

_log = logging.getLogger('trainer')

Fields = Mapping[str, jax.ShapeDtypeStruct]


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Exports a checkpoint of the work directory, and says what is in the files."""
    logfile.route(None)
    check_alone()
    state = restore(trainer, command)
    setup = trainer.set_up()
    if not setup.evaluators:
        raise UserError('--mode=export takes task and fields from config.evals, and there are none')
    evaluator = next(iter(setup.evaluators.values()))
    directory = workdir_of(trainer).path / f'export_{int(state.step)}'
    about = write(
        evaluator, state, directory, axes=tuple(setup.mesh.shape), platforms=command.platforms
    )
    print(f'exported step {about["step"]:,} to {directory}: predictions of evals.{evaluator.name}')
    print(f'  {FUNCTION}({", ".join(about["arguments"])}) for {", ".join(about["platforms"])}')
    for kind in ('batch', 'outputs'):
        print(f'    {kind}: ' + ', '.join(f'{name} {x}' for name, x in about[kind].items()))
    print(f'  {MSGPACK}, {SAFETENSORS}: {len(about["variables"])} arrays')
    return 0


def write(
    evaluator: Evaluator,
    state: TrainState,
    directory: epath.Path,
    *,
    axes: Sequence[str] = (),
    platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
    most_within: int = MOST_WITHIN,
) -> dict[str, Any]:
    """Writes the predictions of an evaluation's task, and the variables that they are made with.

    Args:
        evaluator: says which task, which fields a batch has, and whether parameters are the moving
            average.
        state: of a checkpoint.
        directory: made if it is not there; files of an earlier export are replaced.
        axes: names of the run's mesh axes, which the model may mention.
        platforms: what the function is compiled for.
        most_within: variables of more bytes than these are an argument of the function.

    Returns:
        What `export.json` says: the function's fields, outputs and platforms, the variables'
        shapes, versions, and under `requires` the packages that a caller needs, with the versions
        that have written the function.

    Raises:
        UserError: if the task has no predictions, or the directory cannot be written.
    """
    check_alone()
    prediction = evaluator.prediction(state)
    variables = fetch(evaluator.variables(state))
    kept = {name: tree for name, tree in variables.items() if name != EMA}
    within = nbytes(kept) <= most_within
    predict = _Predict(prediction, int(state.step), variables if within else None)
    spec = _spec(prediction, evaluator.name)
    # Of one device: what the model says of a larger mesh is not for those who call the function.
    alone = jax.make_mesh(
        (1,) * len(axes), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:1],
    )  # fmt: skip
    with named_axes((), alone):
        function = _exported(predict, () if within else (kept,), spec, platforms)
    flat = {'/'.join(path): np.asarray(x) for path, x in flatten_dict(kept).items()}
    about = {
        'step': int(state.step),
        'evaluation': evaluator.name,
        'task': repr(evaluator.step.task.task),
        **_about_function(function, ['batch'] if within else ['variables', 'batch']),
        'variables': {path: f'{x.dtype}{list(x.shape)}' for path, x in flat.items()},
        'versions': versions(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FUNCTION).write_bytes(bytes(function.serialize()))
        (directory / MSGPACK).write_bytes(serialization.msgpack_serialize(kept))
        safetensors.write(directory / SAFETENSORS, flat)
        (directory / ABOUT).write_text(json.dumps(about, indent=2) + '\n')
    except OSError as error:
        raise UserError(f'{directory} cannot be written: {error.strerror or error}') from error
    return about


def _spec(prediction: Prediction, evaluation: str) -> dict[str, Any]:
    """Returns shape and dtype of the fields that the exported function takes."""
    spec = {n: s for n, s in prediction.fields.shapes.items() if n != MASK}
    if not spec:
        raise UserError(
            f'config.evals.{evaluation}: predict computes nothing from the batch, so there is '
            'no function to export'
        )
    if prediction.unchanged:
        _log.warning(
            'left out of the exported function, because predict returns these fields of the batch '
            'unchanged: %s',
            ', '.join(sorted(prediction.unchanged)),
        )
    return spec


def check_alone() -> None:
    """Raises a UserError, in each of them, if there are several processes."""
    if jax.process_count() > 1:
        raise UserError('--mode=export: run it as one process; it reads any checkpoint')


class _Predict:
    """The predictions of a batch, of some of its fields: the rest is not looked at."""

    def __init__(
        self, prediction: Prediction, count: int, variables: Any, unused: Fields | None = None
    ):
        self.prediction, self.count, self.variables = prediction, count, variables
        self.unused = unused or {}

    def __call__(self, *args: Any) -> dict[str, jax.Array]:
        *given, batch = args
        # A model may index with what is traced, and numpy arrays do not take that.
        variables = jax.tree.map(jnp.asarray, given[0] if given else self.variables)
        rows = next(iter(batch.values())).shape[0]
        fill = {n: jnp.zeros((rows, *s.shape[1:]), s.dtype) for n, s in self.unused.items()}
        whole = {**batch, **fill, MASK: jnp.ones(rows, bool)}
        outputs = self.prediction(variables, jnp.int32(self.count), jnp.int32(0), whole)
        return {name: x for name, x in outputs.items() if name != MASK}

    def without(self, unused: Fields) -> _Predict:
        return _Predict(self.prediction, self.count, self.variables, unused)


def _exported(
    predict: _Predict, before: tuple[Any, ...], spec: Fields, platforms: Sequence[str]
) -> export.Exported:
    """Returns the exported function of a batch with the fields that it looks at, and no others."""
    traced = jax.make_jaxpr(predict)(*before, dict(spec)).jaxpr
    read = {id(x) for equation in traced.eqns for x in equation.invars}
    read |= {id(x) for x in traced.outvars}
    fields = traced.invars[len(jax.tree.leaves(before)) :]
    used = [name for name, x in zip(sorted(spec), fields, strict=True) if id(x) in read] or spec
    unused = {name: s for name, s in spec.items() if name not in used}
    return _of_any_rows(predict.without(unused), before, {n: spec[n] for n in used}, platforms)


def _of_any_rows(
    predict: _Predict, before: tuple[Any, ...], spec: Fields, platforms: Sequence[str]
) -> export.Exported:
    """Returns the function for batches of any number of rows, or of one if the model needs it."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), before)
    make: Callable[..., export.Exported] = export.export(jax.jit(predict), platforms=platforms)
    (rows,) = export.symbolic_shape('rows')
    try:
        return make(
            *abstract,
            {n: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype) for n, s in spec.items()},
        )
    except Exception as error:
        function = make(*abstract, spec)  # What is wrong with the model itself shows here.
        _log.warning(
            'the exported function takes batches of %d rows only, for the model computes with '
            'their number (%s). Let it say x.shape[0] where it says len(x)',
            next(iter(spec.values())).shape[0],
            str(error).partition('\n')[0],
        )
        return function


def _about_function(function: export.Exported, arguments: list[str]) -> dict[str, Any]:
    return {
        'function': FUNCTION,
        'arguments': arguments,
        'batch': _described(function.in_tree, function.in_avals)[0][-1],
        'outputs': _described(function.out_tree, function.out_avals),
        'platforms': list(function.platforms),
        'requires': {name: importlib.metadata.version(name) for name in REQUIRES},
    }


def _described(tree: Any, avals: Sequence[Any]) -> Any:
    return jax.tree.unflatten(tree, [f'{x.dtype}[{", ".join(map(str, x.shape))}]' for x in avals])
