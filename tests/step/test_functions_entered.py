# SPDX-License-Identifier: Apache-2.0
"""Counts the functions of this project that are entered while a default step is traced.

The number bounds what a reader of the step has to know. The step of `configs/mnist_mlp.py` is
traced in a separate process: other tests may have imported modules that add functions to each call.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.command import ROOT

MOST_FUNCTIONS, MOST_FILES, MOST_FRAMES, MOST_LINES = 40, 9, 5, 60

TRACE = """
import ast, json, pathlib, sys
import jax
import trainer
from trainer.experiment import load_and_build
from trainer.parallel.mesh import batch_sharding
from trainer.tasks import Classification
from trainer.trainer import Trainer

ROOT = str(pathlib.Path(trainer.__file__).parent) + '/'
# Before Python 3.12, comprehensions are functions.
COMPREHENSIONS = ('<listcomp>', '<dictcomp>', '<setcomp>', '<genexpr>')
setup = Trainer(load_and_build('configs/mnist_mlp.py')).set_up()
programs = setup.programs
step = programs._train_step.update
batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(setup.mesh))
    for name, x in programs.fields.shapes.items()
}
entered, frames = set(), []

def is_ours(code):
    return code.co_filename.startswith(ROOT) and code.co_name not in COMPREHENSIONS

def profile(frame, event, argument):
    if event != 'call' or not is_ours(frame.f_code):
        return
    entered.add(frame.f_code)
    if frame.f_code is Classification._softmax.__code__:
        way = []
        while frame is not None:
            if is_ours(frame.f_code):
                way.append(frame.f_code.co_name)
            frame = frame.f_back
        frames.append(way)

with programs._tracing():
    sys.setprofile(profile)
    try:
        jaxpr = jax.make_jaxpr(step)(programs.abstract, batch)
    finally:
        sys.setprofile(None)
lines = {}
for file in {code.co_filename for code in entered}:
    for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            lines[f'{file.removeprefix(ROOT)}:{node.name}'] = node.end_lineno - first + 1
found = [f'{c.co_filename.removeprefix(ROOT)}:{c.co_name}' for c in entered]
print(json.dumps({
    'entered': sorted(found),
    'frames': frames,
    'lines': [[name, lines.get(name, 1)] for name in found],
    'checks': {'health': programs.abstract.health is not None, 'jaxpr': str(jaxpr)},
}))
"""


@pytest.fixture(scope='module')
def trace() -> Any:
    run = subprocess.run(
        [sys.executable, '-c', TRACE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_default_step_enters_few_functions_and_files(trace: Any) -> None:
    entered = trace['entered']
    assert 'step/train_step.py:default_step' in entered
    files = {name.partition(':')[0] for name in entered}
    assert len(entered) <= MOST_FUNCTIONS, entered
    assert len(files) <= MOST_FILES, files


def test_call_stack_from_step_to_loss_is_short(trace: Any) -> None:
    assert trace['frames']
    for way in trace['frames']:
        assert way.index('default_step') <= MOST_FRAMES, way


def test_entered_functions_are_short(trace: Any) -> None:
    assert [name for name, lines in trace['lines'] if lines > MOST_LINES] == []


def test_traced_step_is_complete(trace: Any) -> None:
    """The trace includes the health flag, the check of labels and the norms."""
    assert trace['checks']['health']
    entered = trace['entered']
    for name in ('skip_if_not_finite', 'apply_update'):
        assert f'step/train_step.py:{name}' in entered
    assert 'tasks/runner.py:run_checks' in entered
    assert 'step/step_metrics.py:norms' in entered
    for operation in ('dot_general', 'is_finite', 'cond'):
        assert operation in trace['checks']['jaxpr']
