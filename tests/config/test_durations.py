# SPDX-License-Identifier: Apache-2.0
"""Durations and periodic events are exact and do not drift."""

from __future__ import annotations

from fractions import Fraction

import jax
import pytest

from trainer.config.durations import Clock, Duration, Periodic, Progress, is_duration, resolve
from trainer.config.errors import UserError
from trainer.step.step_metrics import is_due

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
def test_invalid_durations(text: str) -> None:
    with pytest.raises(UserError, match=r'config\.train_for'):
        Duration.parse(text, 'config.train_for')


def test_durations_that_cannot_be_converted() -> None:
    endless = Clock(batch_size=1, steps_per_epoch=None)
    for text in ('2 epochs', '5%', 'never'):
        with pytest.raises(UserError, match=r'config\.log\.every'):
            endless.steps(Duration.parse(text), path='config.log.every')


def test_events_do_not_drift() -> None:
    """Ten epochs of 117.1875 steps have ten events, each at the first step after its epoch."""
    periodic = CLOCK.period(Duration.parse('1 epochs'), path='x')
    due = [step for step in range(1, 1173) if periodic.is_due(step)]
    assert due == [118, 235, 352, 469, 586, 704, 821, 938, 1055, 1172]


@pytest.mark.parametrize(
    'period', [Fraction(1, 3), Fraction(1), Fraction(7, 2), Fraction(1875, 16)]
)
def test_next_due_and_the_compiled_form_agree_with_is_due(period: Fraction) -> None:
    periodic = Periodic(period)
    due = [step for step in range(1, 400) if periodic.is_due(step)]
    walked, step = [], 0
    while (step := periodic.next_due(step) or 0) < 400:
        walked.append(step)
    assert walked == due
    traced = jax.jit(lambda step: is_due(periodic, step))
    assert [step for step in range(1, 400) if traced(step)] == due


def test_never() -> None:
    periodic = CLOCK.period(Duration.parse('never'), path='x')
    assert periodic.next_due(0) is None
    assert not any(periodic.is_due(step) for step in range(1, 10))


def test_durations_inside_an_optimizer_become_steps() -> None:
    node = {'decay_steps': '100%', 'boundaries': {'1 epochs': 0.1}, 'parts': ('5%', 'adam', 3)}
    resolved, steps = resolve(node, CLOCK, 'config.optimizer')
    assert resolved == {'decay_steps': 1000, 'boundaries': {118: 0.1}, 'parts': (50, 'adam', 3)}
    assert steps['config.optimizer.decay_steps'] == 1000
    assert steps['config.optimizer.parts[0]'] == 50


@pytest.mark.parametrize('period', ['1 epochs', '60000 examples', '10%'])
def test_ten_periods_are_due_ten_times(period: str) -> None:
    """In whatever unit a tenth of ten epochs (1171.875 steps at batch size 512) is written."""
    clock = Clock(batch_size=512, steps_per_epoch=Fraction(60_000, 512), total_steps=1172)
    periodic = clock.period(Duration.parse(period), path='x')
    assert sum(periodic.is_due(step) for step in range(1, 1173)) == 10
    assert periodic.is_due(1172)


def test_periods_do_not_drift_over_a_long_run() -> None:
    periodic = CLOCK.period(Duration.parse('0.1 epochs'), path='x')
    steps = 117_188  # 1000 epochs, 117187.5 steps
    assert sum(periodic.is_due(step) for step in range(1, steps + 1)) == 10_000
    assert periodic.is_due(steps)


def test_next_due_from_any_step() -> None:
    periodic = Periodic(Fraction(7, 2))
    due = [step for step in range(1, 100) if periodic.is_due(step)]
    for step in range(90):
        assert periodic.next_due(step) == next(d for d in due if d > step)


def test_a_period_shorter_than_a_step_is_always_due() -> None:
    periodic = CLOCK.period(Duration.parse('1 examples'), path='x')
    assert all(periodic.is_due(step) for step in range(1, 20))
    assert periodic.next_due(7) == 8


def test_percent_needs_the_length_of_the_run_and_examples_do_not() -> None:
    clock = Clock(batch_size=10, steps_per_epoch=None)
    with pytest.raises(UserError, match=r"config\.checkpoint\.every: '5%'"):
        clock.period(Duration.parse('5%'), path='config.checkpoint.every')
    assert clock.steps(Duration.parse('25 examples'), path='x') == 3


@pytest.mark.parametrize(
    ('text', 'unit'),
    [('never', 'never'), ('1 step', 'steps'), ('2 example', 'examples'), (' 3epochs ', 'epochs')],
)
def test_is_duration_accepts_what_parse_accepts(text: str, unit: str) -> None:
    assert is_duration(text)
    assert Duration.parse(text).unit == unit


@pytest.mark.parametrize('value', ['10 epochs or so', 'epochs', '5.5.5 steps', '5 Steps', 10, None])
def test_is_duration_rejects_what_parse_rejects(value: object) -> None:
    assert not is_duration(value)
    with pytest.raises(UserError, match='a duration'):
        Duration.parse(value)


def test_resolve_does_not_change_never() -> None:
    assert resolve({'mode': 'never', 'n': '2 steps'}, CLOCK, 'x') == (
        {'mode': 'never', 'n': 2}, {'x.n': 2},
    )  # fmt: skip


def test_two_keys_with_the_same_step_are_an_error() -> None:
    """A piecewise schedule would silently lose one of them."""
    node = {'boundaries': {'50%': 0.1, '500 steps': 0.1}}
    with pytest.raises(UserError, match=r"boundaries: '50%' and '500 steps' are both step 500"):
        resolve(node, CLOCK, 'config.optimizer.learning_rate')
    with pytest.raises(UserError, match=r"500 and '50%' are both step 500"):
        resolve({500: 1, '50%': 2}, CLOCK, 'x')


SIZES = ((0, 32), (13, 50), (17, 8), (40, 100))


def make_clock(sizes: tuple[tuple[int, int], ...], *, epoch: int = 250) -> Clock:
    """Returns the clock of a run with these batch sizes that consumes every example."""
    batch_size = sizes[-1][1]
    marks = [
        (Fraction(step), Fraction(count_examples(sizes, step), batch_size)) for step, _ in sizes
    ]
    return Clock(
        batch_size=batch_size,
        steps_per_epoch=Fraction(epoch, batch_size),
        total_steps=60,
        progress=Progress(tuple(marks)),
    )


def count_examples(sizes: tuple[tuple[int, int], ...], step: int) -> int:
    """Returns the number of examples of the first steps, added one by one."""
    return sum([size for first, size in sizes if first <= number][-1] for number in range(step))


@pytest.mark.parametrize('period', ['1 epochs', '0.3 epochs', '77 examples', '7.5%', '1 examples'])
def test_events_count_examples_across_batch_sizes(period: str) -> None:
    clock = make_clock(SIZES)
    examples = {
        '1 epochs': Fraction(250), '0.3 epochs': Fraction(75), '77 examples': Fraction(77),
        '7.5%': Fraction(75, 1000) * count_examples(SIZES, 60), '1 examples': Fraction(1),
    }[period]  # fmt: skip
    periodic = clock.period(Duration.parse(period), path='x')
    done = [count_examples(SIZES, step) for step in range(62)]
    expected = [s for s in range(1, 61) if done[s] // examples > done[s - 1] // examples]
    assert [step for step in range(1, 61) if periodic.is_due(step)] == expected
    for step in range(50):
        assert periodic.next_due(step) == next(due for due in [*expected, 61] if due > step)
    # The compiled form knows only the current part, and its first step is always due.
    traced = jax.jit(lambda step: is_due(periodic, step))
    assert traced(41)
    present = [step for step in range(42, 61) if traced(step)]
    assert present == [step for step in expected if step >= 42]


def test_durations_in_steps_do_not_depend_on_the_batch_size() -> None:
    clock = make_clock(SIZES)
    assert clock.period(Duration.parse('7 steps'), path='x') == Periodic(Fraction(7))
    assert clock.step_after(Duration.parse('50 steps'), path='x') == 50
    assert clock.steps(Duration.parse('50 steps'), path='x') == 50


@pytest.mark.parametrize('examples', [1, 32, 33, 416, 417, 616, 700, 800, 801, 5000])
def test_step_after_rounds_up(examples: int) -> None:
    step = make_clock(SIZES).step_after(Duration.parse(f'{examples} examples'), path='x')
    assert count_examples(SIZES, step - 1) < examples <= count_examples(SIZES, step)


def test_an_epoch_that_ends_in_a_batch_size_change_is_due_at_the_next_step() -> None:
    """If the rest of the epoch is dropped, it ends between two steps, and no event is lost."""
    marks = ((0, 0), (7, Fraction(7, 2)), (7, 4))
    progress = Progress(tuple((Fraction(a), Fraction(b)) for a, b in marks))
    periodic = Periodic(Fraction(4), progress)
    assert [step for step in range(1, 20) if periodic.is_due(step)] == [8, 11, 15, 19]
    assert periodic.next_due(7) == 8
    assert progress.step_at(Fraction(4)) == 7
    assert is_due(periodic, 8)
    assert [step for step in range(9, 20) if is_due(periodic, step)] == [11, 15, 19]
