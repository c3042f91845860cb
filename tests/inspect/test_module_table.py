# SPDX-License-Identifier: Apache-2.0
"""The table of modules that `--mode=summary` shows."""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest

from tests import command
from tests.command import ROOT
from tests.inspect.models import build, linen, nnx_model
from trainer.experiment import Experiment, load_and_build
from trainer.inspect import module_table
from trainer.inspect.forward import Forward
from trainer.inspect.module_table import Row
from trainer.modules.recorder import SCOPE
from trainer.observe import flops
from trainer.trainer import Trainer


def table(made: Experiment) -> dict[str, Row]:
    trainer = Trainer(made)
    spec = trainer.set_up().programs.fields.shapes
    forward = Forward.from_experiment(made, trainer.set_up().mesh)
    return {
        row.path: row
        for row in module_table.rows(forward, trainer.set_up().programs.abstract, spec)
    }


def parameters(made: Experiment) -> int:
    return sum(
        math.prod(x.shape) for x in jax.tree.leaves(Trainer(made).set_up().programs.abstract.params)
    )


@pytest.mark.parametrize(
    ('config', 'names'),
    [
        ('mnist', ['(model)', 'Conv_0', 'Conv_1', 'Dense_0', 'Dropout_0', 'Dense_1']),
        ('mnist_nnx', ['(model)', 'conv1', 'conv2', 'dense1', 'dropout', 'dense2']),
    ],
)
def test_the_quickstart(config: str, names: list[str]) -> None:
    """Parameters and operations of each module; both sum up to the total."""
    rows = table(load_and_build(str(ROOT / 'configs' / f'{config}.py')))
    assert list(rows) == names
    owned = [row.parameters for row in rows.values()]
    assert owned == [0, 320, 18_496, 803_072, 0, 2_570] and sum(owned) == 824_458
    conv = [32 * 28 * 28 * 9 * 32, 32 * 14 * 14 * 9 * 32 * 64]
    dense = [32 * 3136 * 256, 32 * 256 * 10]
    expected = [0.0, *(2.0 * products for products in (*conv, dense[0])), 0.0, 2.0 * dense[1]]
    assert [row.flops for row in rows.values()] == expected
    assert rows[names[3]].output == '32 x 256'


@pytest.mark.slow
def test_the_mode_shows_it() -> None:
    """`--mode=summary` prints the table; its rows add up to the number of parameters."""
    finished = command.run(command.MLP, '--mode=summary')
    assert finished.code == 0, finished.err
    header, _, *lines = finished.out.partition('\nmodule ')[2].splitlines()
    assert header.split() == ['class', 'output', 'parameters', 'flops', 'forward']
    total = next(line for line in lines if line.startswith('total'))
    own = [line.split()[-2] for line in lines if line.startswith('Dense')]
    added = sum(int(number.replace(',', '')) for number in own)
    assert total.split()[1] == f'{added:,}'
    assert f'{added:,} parameters' in finished.out
    assert 'FLOPs per train step' in finished.out


def test_an_ensemble_shows_one_member() -> None:
    alone, several = (Trainer(build(linen(), **more)) for more in ({}, {'ensemble': {'size': 3}}))
    text, of_one = (
        module_table.describe(t.experiment, t.set_up().mesh, t.set_up().programs)
        for t in (several, alone)
    )
    title, _, shown = text.partition('\n')
    assert title == 'each member' and shown == of_one


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('model', [linen(), linen(scans=True), nnx_model()])
def test_the_rows_sum_up(model: Any, accumulate: int) -> None:
    """With scanned layers, and with micro-batches."""
    made = build(model, accumulate=accumulate)
    rows = table(made)
    assert sum(row.parameters for row in rows.values()) == parameters(made)
    products = 784 * 16 + 4 * 16 * 16 + 16 * 10
    assert sum(row.flops for row in rows.values()) == 2 * 32 * products
    if model == linen(scans=True):
        assert rows['layers/layer/dense'].flops == 2 * 32 * 4 * 16 * 16
        assert rows['layers/layer/dense'].output == f'4 x {32 // accumulate} x 16'


@pytest.mark.parametrize('how', ['cond', 'fori_loop', 'while_loop', 'checkpoint'])
def test_modules_in_nnx_branches_and_loops_have_no_output(how: str) -> None:
    """Recorded values could not leave a branch or loop, so modules called there have no output."""
    model = {'target': 'tests.inspect.models:BranchingBelow', 'how': how}
    rows = table(build(model))
    outputs = {path: row.output for path, row in rows.items()}
    within = dict.fromkeys(('one', 'two') if how == 'cond' else ('one',), '')
    assert outputs == {'(model)': '32 x 10', 'first': '32 x 10', **within}
    assert rows['first'].flops == 2 * 32 * 784 * 10


def with_a_product(model: Any, batch: Any) -> Any:
    logits = model(batch['image'])
    return (logits @ logits.T).sum(-1)


def test_operations_of_the_task_have_a_row() -> None:
    rows = table(build(linen(), task={'ref': f'{__name__}:with_a_product'}))
    assert rows[module_table.TASK].flops == 2 * 32 * 10 * 32


def test_operations_by_module() -> None:
    """The cost of a `cond` is that of its most expensive branch, in any position."""

    def function(x: jax.Array) -> Any:
        with jax.named_scope(f'{SCOPE}a|b'):
            y = jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)
        return jax.lax.scan(lambda c, _: (c @ x, None), y, None, length=5)[0]

    found = flops.count_by_key(
        jax.make_jaxpr(function)(jax.numpy.ones((4, 4))), module_table.module_of, 'out'
    )
    assert found == {'a/b': 2 * 128, 'out': 5 * 128}
