# SPDX-License-Identifier: Apache-2.0
"""Durations and periodic events: exact, without drift."""

from __future__ import annotations

from fractions import Fraction

import jax
import pytest

from trainer.config.durations import Clock, Duration, Periodic, is_duration, resolve
from trainer.config.errors import UserError
from trainer.step.train_step import is_due

CLOCK = Clock(batch_size=512, steps_per_epoch=Fraction(60_000, 512), total_steps=1000)


@pytest.mark.parametrize(
    ('text', 'steps'),
    [
        ('10 epochs', 1172),  # 1171.875, rounded up
        ('1epoch', 118),
        ('0.5 epochs', 59),
        ('500steps', 500),
        ('1e3 steps', 1000),
        ('60000 examples', 118),
        ('512 examples', 1),
        ('5%', 50),
        ('0.15 %', 2),
    ],
)
def test_units(text: str, steps: int) -> None:
    assert is_duration(text)
    assert CLOCK.steps(Duration.parse(text), path='x') == steps
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


@pytest.mark.parametrize('text', ['10', 'ten epochs', '5 minutes', '', '0 steps', '-1 steps', '%'])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError, match=r'config\.train_for'):
        Duration.parse(text, 'config.train_for')


def test_what_cannot_be_counted() -> None:
    endless = Clock(batch_size=1, steps_per_epoch=None)
    for text in ('2 epochs', '5%', 'never'):
        with pytest.raises(UserError, match=r'config\.log\.every'):
            endless.steps(Duration.parse(text), path='config.log.every')


def test_events_do_not_drift() -> None:
    """Ten epochs of 117.1875 steps hold ten events, each at the first step past its border."""
    periodic = CLOCK.period(Duration.parse('1 epochs'), path='x')
    due = [step for step in range(1, 1173) if periodic.due(step)]
    assert due == [118, 235, 352, 469, 586, 704, 821, 938, 1055, 1172]


@pytest.mark.parametrize(
    'period', [Fraction(1, 3), Fraction(1), Fraction(7, 2), Fraction(1875, 16)]
)
def test_next_due_and_the_traced_form_agree_with_due(period: Fraction) -> None:
    periodic = Periodic(period)
    due = [step for step in range(1, 400) if periodic.due(step)]
    walked, step = [], 0
    while (step := periodic.next_due(step) or 0) < 400:
        walked.append(step)
    assert walked == due
    traced = jax.jit(lambda step: is_due(periodic, step))
    assert [step for step in range(1, 400) if traced(step)] == due


def test_never() -> None:
    periodic = CLOCK.period(Duration.parse('never'), path='x')
    assert periodic.next_due(0) is None
    assert not any(periodic.due(step) for step in range(1, 10))


def test_durations_inside_an_optimizer_become_steps() -> None:
    node = {'decay_steps': '100%', 'boundaries': {'1 epochs': 0.1}, 'parts': ('5%', 'adam', 3)}
    resolved, steps = resolve(node, CLOCK, 'config.optimizer')
    assert resolved == {'decay_steps': 1000, 'boundaries': {118: 0.1}, 'parts': (50, 'adam', 3)}
    assert steps['config.optimizer.decay_steps'] == 1000
    assert steps['config.optimizer.parts[0]'] == 50
