# SPDX-License-Identifier: Apache-2.0
"""The table of a model's modules: outputs, parameters and floating-point operations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from trainer import compat
from trainer.config.columns import align_columns
from trainer.ensemble.step import member_state
from trainer.experiment import Experiment
from trainer.inspect.forward import Batch, Forward
from trainer.inspect.statistics import float_leaves
from trainer.modules.model_view import param_path
from trainer.modules.recorder import ROOT, SCOPE, ModuleRecorder
from trainer.observe import flops, repeats
from trainer.observe.table import count
from trainer.step.programs import Programs
from trainer.step.state import TrainState

# The row of the operations that are outside of all modules.
TASK = '(task)'
_SCOPE = re.compile(rf'{SCOPE}([^/()]*)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A module without its submodules, which have their own rows.

    Attributes:
        path: path of the module.
        kind: name of the module's class.
        output: shape of its (first) output for a whole batch, with a leading dimension for each
            enclosing scan.
        parameters: number of values.
        flops: floating-point operations of its matrix products and convolutions in a forward pass
            of the whole batch.
    """

    path: str
    kind: str
    output: str
    parameters: int
    flops: float


def describe(experiment: Experiment, mesh: Mesh, programs: Programs) -> str:
    """Returns the module table of an experiment's model, or of one member of an ensemble.

    Args:
        experiment: what is trained.
        mesh: the device mesh.
        programs: the training programs.
    """
    state, batch = programs.abstract, programs.fields.shapes
    forward = Forward.from_experiment(experiment, mesh, programs.task)
    if experiment.ensemble is None:
        return table(rows(forward, state, batch))
    member = jax.eval_shape(lambda state: member_state(state, 0), state)
    return f'each member\n{table(rows(forward, member, batch))}'


def rows(forward: Forward, state: TrainState, batch: Batch) -> list[Row]:
    """Returns the modules in the order of their calls; nothing is computed.

    Parameters of modules that are not called and operations of the task have rows too, so that the
    rows sum up to the totals.

    Args:
        forward: the forward pass of the train step.
        state: shapes and dtypes of the train state.
        batch: shapes and dtypes of a batch.
    """
    state = dataclasses.replace(state, metrics=None)

    def outputs(output: Any, inputs: Any, variables: Any) -> list[Any]:
        return [x for _, x in float_leaves(output)]

    recorder = ModuleRecorder(outputs)

    def run(state: TrainState, batch: Batch) -> Any:
        output = forward(recorder, state, batch)
        return [o.loss for o in output], recorder.records

    jaxpr, (_, records) = forward.jaxpr(run, state, batch)
    shapes: dict[str, str] = {}
    for path, record in ((p, r) for call in records for p, each in call.items() for r in each):
        # Of several calls the first one is shown.
        for x in record['value'][:1]:
            shapes.setdefault(path, ' x '.join(map(str, x.shape)) or 'scalar')
    operations = flops.count_by_key(jaxpr, module_of, TASK)
    parameters = _count_by_owner(state.params, recorder.called)
    # In the order of the calls, each module before its submodules.
    paths = dict.fromkeys((*recorder.called, *parameters, *operations))
    return [
        Row(
            path=path or ROOT,
            kind=recorder.called.get(path, ''),
            output=shapes.get(path, ''),
            parameters=parameters.get(path, 0),
            flops=operations.get(path, 0.0),
        )
        for path in paths
    ]


def table(rows: list[Row]) -> str:
    """Returns the rows and their totals as text."""
    lines: list[tuple[str, ...]] = [('module', 'class', 'output', 'parameters', 'flops forward')]
    kinds = [(row.kind, row.output, row.parameters, row.flops) for row in rows]
    for line in repeats.fold([row.path for row in rows], kinds):
        row = rows[line.entry]
        numbers = (_format_number(x, line.count) for x in (row.parameters, row.flops))
        lines.append((line.path, row.kind, row.output, *numbers))
    total = sum(row.parameters for row in rows), sum(row.flops for row in rows)
    lines.append(('total', '', '', f'{total[0]:,}', _format_number(total[1])))
    return '\n'.join(align_columns(lines, right=(3, 4)))


def _format_number(value: float, count: int = 1) -> str:
    return repeats.text(count, value) if value else ''


def _count_by_owner(params: Any, called: Mapping[str, str]) -> dict[str, int]:
    """Returns the number of values that belong to each module itself, by module path."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # The owner is the innermost module that is called; dicts of parameters are not modules.
        parents = param_path(path).split('/')[:-1]
        while parents and '/'.join(parents) not in called:
            parents.pop()
        owner = '/'.join(parents) if parents or '' in called else param_path(path[:-1])
        counts[owner] = counts.get(owner, 0) + count(leaf)
    return counts


def module_of(equation: Any, outer: str) -> str:
    """Returns the path of the innermost module around an equation, `outer` if there is none.

    Only equations traced with a `ModuleRecorder` have the names of modules.
    """
    scopes = _SCOPE.findall(compat.name_stack(equation))
    return scopes[-1].replace('|', '/') if scopes else outer
