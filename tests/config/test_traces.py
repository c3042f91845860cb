# SPDX-License-Identifier: Apache-2.0
"""Tracebacks of errors in the user's code, and notes on what the task was called with."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from tests import command, small
from trainer.config import traces
from trainer.config.errors import UserError, full_text
from trainer.run import failure

HERE = __name__


class Net(nn.Module):
    """Multiplies arrays whose shapes do not match."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.Dense(5)(x.reshape((x.shape[0], -1)))
        weight = self.param('weight', nn.initializers.ones, (7, 3))
        return jnp.dot(
            hidden,
            weight,
        )


def bad_loss(model: Any, batch: Any) -> Any:
    logits = model(batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits,
        batch['label'][:, None, None],
    )


class Predicting:
    """A task that fails only in `predict`."""

    def __call__(self, model: Any, batch: Any) -> Any:
        return model(batch['image']).sum(-1)

    def predict(self, model: Any, batch: Any) -> Any:
        return {'x': model(batch['image']) - jnp.ones(7)}


def notes_of(raised: pytest.ExceptionInfo[Exception]) -> list[str]:
    return getattr(raised.value, '__notes__', [])


def test_a_shape_error_names_the_output_of_the_model_and_the_label() -> None:
    trainer = small.trainer_in(None, task={'ref': f'{HERE}:bad_loss'})
    with pytest.raises(ValueError, match='dimensions') as raised:
        trainer.compile()
    assert notes_of(raised)[-3:] == [
        'model(float32[32, 28, 28, 1]) returned float32[32, 10]',
        "The task also read batch['label']: int32[32]",
        f'The task {HERE}:bad_loss was called with the batch image: float32[32, 28, 28, 1], '
        'label: int32[32]',
    ]
    shown = traces.format_traceback(raised.value).splitlines()
    assert shown[0] == 'Traceback (most recent call last):'
    assert shown[1].endswith(f'frames of libraries are left out: {traces.HOW_TO_SEE_ALL}]')
    assert [line for line in shown if line.startswith('  File')][1:] == [shown[4]]
    first = bad_loss.__code__.co_firstlineno
    assert shown[4:] == [
        f'  File "{__file__}", line {first + 2}, in bad_loss',
        '    return optax.softmax_cross_entropy_with_integer_labels(',
        '        logits,',
        "        batch['label'][:, None, None],",
        '    )',
        f'ValueError: {raised.value}',
        *notes_of(raised)[-3:],
    ]
    assert failure.describe(raised.value, 0)['where'] == f'{__file__}:{first + 2} in bad_loss'


def test_a_shape_error_inside_the_model() -> None:
    with pytest.raises(TypeError, match='contracting') as raised:
        small.trainer_in(None, model={'target': f'{HERE}:Net'}).compile()
    assert 'model(float32[32, 28, 28, 1]) did not return' in notes_of(raised)
    shown = traces.format_traceback(raised.value).splitlines()
    last = max(number for number, line in enumerate(shown) if line.startswith('  File'))
    assert shown[last].endswith('in __call__')
    assert shown[last + 1 : last + 5] == [
        '    return jnp.dot(', '        hidden,', '        weight,', '    )',
    ]  # fmt: skip


@pytest.mark.slow
def test_a_shape_error_in_an_evaluation_and_in_its_predictions() -> None:
    task = {'ref': f'{HERE}:bad_loss'}
    with pytest.raises(ValueError, match='dimensions') as raised:
        small.trainer_in(None, evals__test__task=task).compile()
    notes = '\n'.join(notes_of(raised))
    assert 'returned float32[512, 10]' in notes and "batch['label']: int32[512]" in notes
    assert f'Its task {HERE}:bad_loss was called with the batch image: ' in notes
    trainer = small.trainer_in(None, task={'target': f'{HERE}:Predicting'})
    with pytest.raises(ValueError, match='ncompatible shapes') as raised:
        next(iter(trainer.predict('test', trainer.init_state())))
    assert 'returned float32[512, 10]' in '\n'.join(notes_of(raised))


def test_frames_that_a_traceback_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode() -> None:
        try:
            json.loads('{')
        except ValueError as error:
            raise KeyError('no "a"') from error

    with pytest.raises(KeyError) as raised:
        decode()
    raised.value.add_note('a note')
    shown = traces.format_traceback(raised.value)
    # Its cause has a frame in this file as well; those of `json` are left out.
    assert shown.count('Traceback (most recent call last):') == 2 and 'direct cause of' in shown
    assert "json.loads('{')" in shown and 'decoder.py' not in shown
    assert shown.endswith('KeyError: \'no "a"\'\na note')
    monkeypatch.setenv('JAX_TRACEBACK_FILTERING', 'off')
    assert 'decoder.py' in traces.format_traceback(raised.value)
    monkeypatch.delenv('JAX_TRACEBACK_FILTERING')
    # A traceback without any frame of the user is complete.
    error = raised.value.__cause__
    assert error is not None and error.__traceback__ is not None
    inside = error.with_traceback(error.__traceback__.tb_next)
    assert 'decoder.py' in traces.format_traceback(inside)


def test_parts_that_a_traceback_keeps() -> None:
    """The message of each error of a chain or a group, and a few frames of a recursion."""

    def recurse(depth: int) -> None:
        if depth:
            recurse(depth - 1)
        error = ValueError('of mine')
        error.__cause__ = OSError('no space left')  # Raised in a library.
        raise error

    with pytest.raises(ValueError) as raised:
        recurse(50)
    shown = traces.format_traceback(raised.value)
    assert 'OSError: no space left\n\nThe above exception was the direct cause' in shown
    assert '[repeated 47 more times]' in shown and shown.count('in recurse') == 4

    def several() -> None:
        raise ExceptionGroup('two', [ValueError('one'), OSError('other')])

    with pytest.raises(ExceptionGroup) as group:
        several()
    assert 'OSError: other' in traces.format_traceback(group.value)


def test_a_traceback_has_no_note_of_jax() -> None:
    def fail(x: Any) -> Any:
        raise UserError('wrong')

    with pytest.raises(UserError) as raised:
        jax.jit(fail)(1)
    raised.value.add_note('for example')
    assert full_text(raised.value) == 'wrong\nfor example'


@pytest.mark.slow
def test_logs_and_output_of_a_failing_task(tmp_path: pathlib.Path) -> None:
    done = command.run(
        command.MLP,
        f'--config.task={{"ref": "{HERE}:bad_loss"}}',
        f'--workdir={tmp_path}',
    )
    assert done.code == 1
    log, debug = (tmp_path / 'log.txt').read_text(), (tmp_path / 'debug.log').read_text()
    shown = done.err[done.err.index('Traceback') :].splitlines()
    assert len(shown) == 11
    assert shown[1].endswith(f'see {tmp_path}/debug.log]') and shown[2].endswith('in bad_loss')
    assert all(line in log for line in shown)
    assert 'trainer/step/programs.py' in debug and 'trainer/step/programs.py' not in log
    assert command.result(tmp_path)['error']['where'].endswith('in bad_loss')
