# SPDX-License-Identifier: Apache-2.0
"""Layers of a loop become those of a scan, and vice versa."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.command import ROOT
from tests.weights.examples import assert_same
from trainer.config.errors import UserError
from trainer.experiment import load_and_build
from trainer.models.transformer import Transformer
from trainer.trainer import Trainer
from trainer.weights.stacking import Stack, Unstack
from trainer.weights.surgery import operate

LAYERS: dict[str, Any] = {
    f'block_{index}': {'kernel': np.full((2, 3), index, 'f4')} for index in range(11)
}
REST: dict[str, Any] = {'head': {'kernel': np.ones((3, 2), 'f4')}}


def test_round_trip() -> None:
    """In the order of the numbers, with the slots of the optimizer."""
    params = {**LAYERS, **REST}
    tx = optax.adam(0.1)
    opt_state = tx.update(jax.tree.map(lambda x: x + 1, params), tx.init(params), params)[1]
    stacked, slots = operate([Stack()], params, opt_state, tx)
    assert stacked['blocks']['kernel'].shape == (11, 2, 3)
    assert stacked['blocks']['kernel'][:, 0, 0].tolist() == list(range(11))
    moments = [opt_state[0].mu[f'block_{i}']['kernel'] for i in range(11)]
    np.testing.assert_array_equal(slots[0].mu['blocks']['kernel'], np.stack(moments))
    assert jax.tree.structure(slots) == jax.tree.structure(tx.init(stacked))
    again, back = operate([Unstack()], stacked, slots, tx)
    assert_same(again, params)
    assert_same(back, opt_state)


def lm(workdir: pathlib.Path, **overrides: Any) -> Trainer:
    text = workdir.parent / 'text.txt'
    text.write_text('to be, or not to be: ' * 20)
    source = {'target': 'trainer.data.text:Bytes', 'path': str(text), 'seq_len': 12}
    small = dict(model__layers=2, model__width=16, model__heads=2, train_for='3 steps')
    experiment = load_and_build(
        str(ROOT / 'configs' / 'lm.py:bytes'), **small, data__source=source, evals={}, **overrides
    )
    return Trainer(experiment, workdir)


@pytest.mark.slow
@pytest.mark.parametrize('scanned', [False, True])
def test_training_continues_in_the_other_form(tmp_path: pathlib.Path, scanned: bool) -> None:
    """A scan starts from parameters, averages and moments of a loop, and vice versa."""
    old = lm(tmp_path / 'old', model__scan_layers=scanned).fit().state
    operation = 'Unstack' if scanned else 'Stack'
    new = lm(
        tmp_path / 'new', model__scan_layers=not scanned,
        init_from={'path': str(tmp_path / 'old'), 'optimizer': True},
        surgery=({'target': f'trainer.weights:{operation}'},),
    )  # fmt: skip
    state = new.init_state()
    tokens = np.arange(24).reshape(2, 12)
    model = Transformer(layers=2, width=16, heads=2, max_length=128)
    before, after = (
        model.clone(scan_layers=form).apply({'params': params}, tokens)
        for form, params in ((scanned, old.params), (not scanned, state.params))
    )
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)
    sizes = [
        sum(float(np.abs(x).sum()) for x in jax.tree.leaves(s.opt_state) if x.ndim)
        for s in (old, state)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5) and sizes[0] > 0


MISTAKES = [
    (Stack(pattern=r'^layer_(\d+)/'), 'matches no array. The paths are '),
    (Stack(pattern=r'^block_\d+/'), "the pattern needs one group, the layer's number"),
    (Stack(pattern=r'^(block)_\d+/'), "the pattern needs one group, the layer's number"),
    (Stack(pattern='('), 'missing '),
    (Stack(pattern=r'^block_(\d)/'), 'blocks/kernel has only the layers 0, 2; one is missing'),
    (
        Stack(pattern=r'^b_(\d)/', replacement='b/'),
        r'the layers of params/b/w have different shapes: \[2\], \[3\]',
    ),
    (Stack(pattern=r'^b_(\d)/w', replacement='taken/w'), 'params/taken/w already exists'),
    (Unstack(), 'matches no array'),
    (Unstack(pattern='^one'), 'params/one is a scalar'),
]


@pytest.mark.parametrize(('operation', 'message'), MISTAKES)
def test_invalid_stacks_are_refused(operation: Any, message: str) -> None:
    shapes = [(2,), (2,)] if 'taken' in str(operation) else [(2,), (3,)]
    params = {
        **{f'block_{i}': LAYERS['block_0'] for i in (0, 2)},
        **{f'b_{i}': {'w': np.ones(shape, 'f4')} for i, shape in enumerate(shapes)},
        'taken': {'w': np.ones(2)},
        'one': np.ones(()),
    }
    with pytest.raises(UserError, match=message):
        operate([operation], params)


def test_unstack_needs_the_number() -> None:
    with pytest.raises(UserError, match=r"the replacement needs one {} for the layer's number"):
        Unstack(replacement='block/')
