# SPDX-License-Identifier: Apache-2.0
"""`--mode=export`: writes a trained model for programs that do not use this package.

The directory contains the task's predictions as a function that any process with `jax` and
`flatbuffers` can call (StableHLO by `jax.export`, which reads its files with flatbuffers; for
batches of any size), and the variables as Flax's msgpack and as safetensors.
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
from trainer.input.structure import Structure
from trainer.modes.command import Command, restore, workdir_of
from trainer.modules.model_view import param_path
from trainer.modules.shapes import describe
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

# The packages needed to read and to call the function.
REQUIRES = ('jax', 'flatbuffers')

# Larger variables (in bytes) become an argument of the function instead of constants in it: as
# constants they are stored a second time, and the file of a function cannot exceed 2 GiB.
MAX_EMBEDDED_BYTES = 2**28

_log = logging.getLogger('trainer')

Fields = Mapping[str, jax.ShapeDtypeStruct]


def run(trainer: Trainer, command: Command, stop: StopRequest) -> int:
    """Exports a checkpoint of the work directory, and prints what the files contain."""
    logfile.route(None)
    check_single_process()
    state = restore(trainer, command)
    setup = trainer.set_up()
    if not setup.evaluators:
        raise UserError(
            '--mode=export needs an evaluation in config.evals: it defines the task and the fields'
        )
    evaluator = next(iter(setup.evaluators.values()))
    directory = workdir_of(trainer).path / f'export_{int(state.step)}'
    about = write(
        evaluator, state, directory, axes=tuple(setup.mesh.shape), platforms=command.platforms
    )
    print(
        f'Exported step {about["step"]:,} to {directory} '
        f'(predictions of the task of evals.{evaluator.name})'
    )
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
    max_embedded_bytes: int = MAX_EMBEDDED_BYTES,
) -> dict[str, Any]:
    """Writes the predictions of an evaluation's task as a function, and its variables.

    Args:
        evaluator: determines the task, the fields of a batch, and whether the parameters are the
            moving average.
        state: train state of a checkpoint.
        directory: created if missing; files of an earlier export are replaced.
        axes: names of the run's mesh axes, which the model may mention.
        platforms: platforms that the function is compiled for.
        max_embedded_bytes: larger variables are an argument of the function.

    Returns:
        The content of `export.json`: the function's fields, outputs and platforms, the variables'
        shapes, versions, and under `requires` the packages that a caller needs, with the versions
        that wrote the function.

    Raises:
        UserError: if the task has no predictions, or the directory cannot be written.
    """
    check_single_process()
    prediction = evaluator.prediction(state)
    variables = fetch(evaluator.variables(state))
    saved = {name: tree for name, tree in variables.items() if name != EMA}
    is_embedded = nbytes(saved) <= max_embedded_bytes
    is_whole = evaluator.data.num_shapes is not None
    embedded = variables if is_embedded else None
    predict = _Predict(prediction, int(state.step), embedded, is_whole=is_whole)
    spec = _spec(prediction, evaluator.name)
    # The model may name axes of the run's mesh, but callers of the function need not have it.
    single_device = jax.make_mesh(
        (1,) * len(axes), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:1],
    )  # fmt: skip
    with named_axes((), single_device):
        function = _export(predict, () if is_embedded else (saved,), spec, platforms)
    flat = {'/'.join(path): np.asarray(x) for path, x in flatten_dict(saved).items()}
    about = {
        'step': int(state.step),
        'evaluation': evaluator.name,
        'task': repr(evaluator.step.task.task),
        **_describe_function(function, ['batch'] if is_embedded else ['variables', 'batch']),
        'variables': {path: f'{x.dtype}{list(x.shape)}' for path, x in flat.items()},
        'versions': versions(),
    }
    _write_files(directory, bytes(function.serialize()), saved, flat, about)
    return about


def _write_files(
    directory: epath.Path,
    function: bytes,
    variables: Mapping[str, Any],
    flat: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FUNCTION).write_bytes(function)
        (directory / MSGPACK).write_bytes(serialization.msgpack_serialize(variables))
        safetensors.write(directory / SAFETENSORS, flat)
        (directory / ABOUT).write_text(json.dumps(about, indent=2) + '\n')
    except OSError as error:
        raise UserError(f'{directory} cannot be written: {error.strerror or error}') from error


def _spec(prediction: Prediction, evaluation: str) -> dict[str, Any]:
    """Returns shape and dtype of the fields that the exported function takes."""
    spec = {n: s for n, s in prediction.fields.shapes.items() if n != MASK}
    if not spec:
        raise UserError(
            f'config.evals.{evaluation}: predict computes nothing from the batch, so there is '
            'nothing to export'
        )
    if prediction.unchanged:
        _log.warning(
            'Left out of the exported function, because predict returns these fields of the batch '
            'unchanged: %s',
            ', '.join(sorted(prediction.unchanged)),
        )
    return spec


def check_single_process() -> None:
    """Raises a UserError, in each process, if there are several."""
    if jax.process_count() > 1:
        raise UserError(
            '--mode=export must run as a single process; it can read the checkpoints of several'
        )


class _Predict:
    """The predictions as a function of the fields that they depend on; zeros replace the others."""

    def __init__(
        self,
        prediction: Prediction,
        count: int,
        variables: Any,
        unused: Fields | None = None,
        structure: Structure | None = None,
        *,
        is_whole: bool = False,
    ):
        self.prediction, self.count, self.variables = prediction, count, variables
        self.unused = unused or {}
        # Whether arrays of a batch need not have one entry for each example.
        self.is_whole = is_whole
        # Of the batches that it takes; None for a dict of arrays.
        self.structure = structure

    def __call__(self, *args: Any) -> dict[str, jax.Array]:
        *given, tree = args
        batch = tree if self.structure is None else self.structure.flatten(tree, 'the batch')
        # As JAX arrays: a model may index them with traced values, which numpy arrays refuse.
        variables = jax.tree.map(jnp.asarray, given[0] if given else self.variables)
        if self.is_whole:
            (size,) = self.prediction.fields.spec[MASK].shape
            fill = {n: jnp.zeros(s.shape, s.dtype) for n, s in self.unused.items()}
        else:
            size = next(iter(batch.values())).shape[0]
            fill = {n: jnp.zeros((size, *s.shape[1:]), s.dtype) for n, s in self.unused.items()}
        whole = {**batch, **fill, MASK: jnp.ones(size, bool)}
        # Batch number 0 and a mask without padding: callers pass whole batches.
        outputs = self.prediction(variables, jnp.int32(self.count), jnp.int32(0), whole)
        return {name: x for name, x in outputs.items() if name != MASK}

    def with_fields(self, used: Fields, unused: Fields) -> _Predict:
        structure = self.prediction.step.task.structure
        if structure is not None:
            structure = structure.restrict(used)
        return _Predict(
            self.prediction,
            self.count,
            self.variables,
            unused,
            structure,
            is_whole=self.is_whole,
        )


def _export(
    predict: _Predict, leading: tuple[Any, ...], spec: Fields, platforms: Sequence[str]
) -> export.Exported:
    """Exports the function of a batch with the fields that the predictions depend on only.

    Args:
        predict: function of `*leading` and a batch.
        leading: arguments that come before the batch: the variables, or none.
        spec: shapes and dtypes of the fields of a batch.
        platforms: platforms to compile for.
    """
    # Read from the jaxpr, and not from the task: a field that is read, by a transform or for a
    # loss, may still not reach any output.
    traced = jax.make_jaxpr(predict)(*leading, dict(spec)).jaxpr
    used_vars = {id(x) for x in traced.outvars}
    for equation in reversed(traced.eqns):
        if any(id(x) in used_vars for x in equation.outvars):
            used_vars |= {id(x) for x in equation.invars}
    fields = traced.invars[len(jax.tree.leaves(leading)) :]
    used = [
        name for name, x in zip(sorted(spec), fields, strict=True) if id(x) in used_vars
    ] or spec
    unused = {name: s for name, s in spec.items() if name not in used}
    used_spec = {name: spec[name] for name in used}
    predict = predict.with_fields(used_spec, unused)
    return _export_any_batch_size(predict, leading, used_spec, platforms)


def _export_any_batch_size(
    predict: _Predict, leading: tuple[Any, ...], spec: Fields, platforms: Sequence[str]
) -> export.Exported:
    """Exports the function for any batch size, or for that of `spec` if the model requires it."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leading)
    export_for: Callable[..., export.Exported] = export.export(
        jax.jit(predict), platforms=platforms
    )
    # The name is part of `export.json`: shapes are written as 'float32[rows, 10]'.
    (rows,) = export.symbolic_shape('rows')

    def arrange(fields: Fields) -> Any:
        structure = predict.structure
        return dict(fields) if structure is None else structure.rebuild(fields)

    if predict.is_whole:
        shapes = ', '.join(f'{n}: {describe(s)}' for n, s in spec.items())
        _log.warning('The exported function only takes batches of one shape: %s', shapes)
        return export_for(*abstract, arrange(spec))
    try:
        any_size = {n: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype) for n, s in spec.items()}
        return export_for(*abstract, arrange(any_size))
    except Exception as error:
        # If the batch size was not the problem, this raises the model's own error.
        function = export_for(*abstract, arrange(spec))
        _log.warning(
            'The exported function only takes batches of %d examples, because the model computes '
            'with the batch size (%s). Use x.shape[0] instead of len(x) in the model',
            next(iter(spec.values())).shape[0],
            str(error).partition('\n')[0],
        )
        return function


def _describe_function(function: export.Exported, arguments: list[str]) -> dict[str, Any]:
    return {
        'function': FUNCTION,
        'arguments': arguments,
        'batch': _list_by_path(_describe_arrays(function.in_tree, function.in_avals)[0][-1]),
        'outputs': _describe_arrays(function.out_tree, function.out_avals),
        'platforms': list(function.platforms),
        'requires': {name: importlib.metadata.version(name) for name in REQUIRES},
    }


def _describe_arrays(tree: Any, avals: Sequence[Any]) -> Any:
    return jax.tree.unflatten(tree, [f'{x.dtype}[{", ".join(map(str, x.shape))}]' for x in avals])


def _list_by_path(tree: Any) -> dict[str, str]:
    return {param_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
