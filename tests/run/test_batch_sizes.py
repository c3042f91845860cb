# SPDX-License-Identifier: Apache-2.0
"""Runs that resume with another batch size: data, events and schedules count examples."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests import command, small
from tests.command import ROOT
from trainer.config.errors import UserError
from trainer.data.order import PADDING, combine
from trainer.experiment import load_and_build
from trainer.input.digest import DataDigest
from trainer.modes.grad_probe import next_step_gradients
from trainer.trainer import Trainer

EXAMPLES = 256
COSINE = {'target': 'optax:cosine_decay_schedule', 'init_value': 0.1, 'decay_steps': '100%'}
IMAGES = {'target': 'trainer.data.mnist:MNIST', 'split': 'train', 'limit': 100}
LATER = {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 156}


def trainer_in(workdir: pathlib.Path | None, *, allow: bool = True, **overrides: Any) -> Trainer:
    options: dict[str, Any] = {'train_for': '2 epochs', 'log__every': '1 steps'}
    options |= {'data__source__limit': EXAMPLES, 'evals__test__every': '1 epochs'}
    return small.trainer_in(workdir, allow=allow, **{**options, **overrides})


def rows(workdir: pathlib.Path, name: str) -> dict[int, float]:
    """Returns the values of a metric by step."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
    return {line['step']: line[name] for line in lines if name in line}


@pytest.fixture
def ids_by_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[int]]]:
    """Returns what the data digest covers: the examples of each step."""
    consumed: dict[int, list[int]] = {}
    add = DataDigest.add

    def add_and_note(self: DataDigest, start: int, ids: np.ndarray, rows: Any = None) -> None:
        for step, row in enumerate(ids.tolist(), start=start):
            assert step not in consumed
            consumed[step] = row
        add(self, start, ids, rows)

    monkeypatch.setattr(DataDigest, 'add', add_and_note)
    yield consumed


def usage_counts(ids_by_step: dict[int, list[int]]) -> dict[int, int]:
    """Returns how many examples were used how many times."""
    real = [i for row in ids_by_step.values() for i in row if i != PADDING]
    _, counts = np.unique(real, return_counts=True)
    return {int(n): int((counts == n).sum()) for n in np.unique(counts)}


# ---- every example as often as there are epochs ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sizes', 'ends'),
    [((32, 64), (16, 24)), ((64, 32), (8, 24)), ((32, 96), (16, 22))],
    ids=['larger', 'smaller', 'no divisor'],
)
def test_resume_after_two_epochs_uses_each_example_equally_often(
    sizes: tuple[int, int], ends: tuple[int, int], tmp_path: pathlib.Path,
    ids_by_step: dict[int, list[int]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trainer_in(tmp_path, data__batch_size=sizes[0]).fit()
    assert usage_counts(ids_by_step) == {2: EXAMPLES}
    capsys.readouterr()
    result = trainer_in(tmp_path, data__batch_size=sizes[1], train_for='4 epochs').fit()
    out = capsys.readouterr().out
    assert (result.status, result.step) == ('finished', ends[1])
    flat = [i for row in ids_by_step.values() for i in row][: 4 * EXAMPLES]
    assert usage_counts({0: flat}) == {4: EXAMPLES}
    assert len([i for row in ids_by_step.values() for i in row]) - 4 * EXAMPLES < sizes[1]
    assert (
        f'config.data.batch_size {sizes[0]} -> {sizes[1]}: resuming at step {ends[0]}, '
        f'after 512 examples (2 epochs); the run ends at step {ends[1]}'
    ) in out
    # At the ends of the epochs, whatever their steps are.
    first = [EXAMPLES // sizes[0], 2 * EXAMPLES // sizes[0]]
    more = [ends[0] + math.ceil(EXAMPLES / sizes[1]), ends[1]]
    assert list(rows(tmp_path, 'eval/test/loss')) == first + more
    meta = trainer_in(tmp_path, data__batch_size=sizes[1]).checkpoints.meta(ends[1])
    assert meta['batch_sizes'] == [[0, sizes[0]], [ends[0], sizes[1]]]
    assert meta['examples'] == 512 + (ends[1] - ends[0]) * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    'data',
    [
        {},
        {'steps_per_call': 3},
        {'data__loader': {'target': 'trainer.data.grain_loader:GrainLoader', 'threads': 2}},
        pytest.param(
            {
                'data__source': {
                    'target': 'trainer.data.mixture:Mixture',
                    'sources': (IMAGES, LATER),
                }
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=['plain', 'steps_per_call', 'grain', 'mixture'],
)
def test_three_batch_sizes_changed_within_epochs(
    data: dict[str, Any], tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    if 'data__source' in data:
        data = {'data__source__limit': None, **data}
    for size, updates in ((32, 11), (64, 3), (16, None)):
        trainer = trainer_in(
            tmp_path,
            data__batch_size=size,
            train_for='4 epochs',
            log__every='0.8 epochs',
            evals={},
            **data,
        )
        result = trainer.fit(max_steps=updates)
    # 11 x 32 + 3 x 64 + 30 x 16 = 4 x 256
    assert (result.status, result.step) == ('finished', 44)
    assert sorted(ids_by_step) == list(range(44))
    assert usage_counts(ids_by_step) == {4: EXAMPLES}
    # 204.8 examples each: step 7 of 32, then 409.6 and so on.
    assert list(rows(tmp_path, 'train/loss')) == [7, 12, 19, 32, 44]


@pytest.mark.slow
@pytest.mark.parametrize('limit', [250, 256])
def test_a_padded_epoch_ends_with_its_own_examples(
    limit: int, tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    more = {'data__remainder': 'pad', 'data__source__limit': limit, 'train_for': '3 epochs'}
    trainer_in(tmp_path, data__batch_size=32, **more).fit(max_steps=12)
    result = trainer_in(tmp_path, data__batch_size=64, **more).fit()
    assert usage_counts(ids_by_step) == {3: limit}
    # 8 of 32; 4 of 32, and of the 122 or 128 that are left 2 of 64; 4 of 64.
    assert (result.status, result.step) == ('finished', 18)
    assert list(rows(tmp_path, 'eval/test/loss')) == [8, 14, 18]


@pytest.mark.slow
def test_the_rest_of_an_epoch_shorter_than_a_batch_is_dropped(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    more = {'data__remainder': 'drop', 'data__source__limit': 250, 'train_for': '3 epochs'}
    trainer_in(tmp_path, data__batch_size=32, **more).fit(max_steps=12)
    result = trainer_in(tmp_path, data__batch_size=64, **more).fit()
    # 7 of 32; 5 of 32, and of the 90 that are left 1 of 64; 3 of 64.
    assert (result.status, result.step) == ('finished', 16)
    assert max(usage_counts(ids_by_step)) == 3
    assert sum(map(len, ids_by_step.values())) == 7 * 32 + 5 * 32 + 64 + 3 * 64
    assert list(rows(tmp_path, 'eval/test/loss')) == [7, 13, 16]


@pytest.mark.slow
def test_the_next_epoch_follows_a_dropped_rest(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    more = {'data__remainder': 'drop', 'train_for': '2 epochs'}
    trainer_in(tmp_path, data__batch_size=32, **more).fit(max_steps=7)
    result = trainer_in(tmp_path, data__batch_size=64, **more).fit()
    # 32 examples of the first epoch are no batch of 64.
    assert (result.status, result.step) == ('finished', 11)
    assert usage_counts(ids_by_step) == {1: 32, 2: EXAMPLES - 32}
    assert list(rows(tmp_path, 'eval/test/loss')) == [8, 11]


@pytest.mark.slow
def test_repeat_batch_uses_the_first_batch_of_the_new_size(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    for size, total in ((32, '5 steps'), (64, '9 steps')):
        trainer = trainer_in(
            tmp_path, data__batch_size=size, data__repeat_batch=2, train_for=total, evals={}
        )
        trainer.fit()
    assert len({tuple(ids_by_step[step]) for step in range(5)}) == 2
    assert sorted(ids_by_step[5] + ids_by_step[6]) == sorted(set(ids_by_step[5] + ids_by_step[6]))
    assert (ids_by_step[5], ids_by_step[6]) == (ids_by_step[7], ids_by_step[8])
    assert ids_by_step[0] + ids_by_step[1] == ids_by_step[6]


# ---- exactness ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'remainder', ['carry', 'pad', pytest.param('drop', marks=pytest.mark.slow)]
)
def test_a_second_resume_is_exact(remainder: str, tmp_path: pathlib.Path) -> None:
    more = {
        'data__remainder': remainder, 'data__source__limit': 250, 'train_for': '4 epochs',
        'optimizer__learning_rate': COSINE, 'log__every': '0.3 epochs', 'evals__test__every': '15%',
    }  # fmt: skip
    results, found = {}, {}
    for name, stops in (('whole', [None]), ('parts', [1, 5, 1, None])):
        workdir = tmp_path / name
        trainer_in(workdir, data__batch_size=32, **more).fit(max_steps=13)
        for number, stop in enumerate(stops):
            # After the change the run has that config, and needs no flag.
            trainer_in(workdir, allow=number == 0, data__batch_size=48, **more).fit(max_steps=stop)
        results[name] = command.result(workdir)
        found[name] = {
            key: rows(workdir, key) for key in ('train/loss', 'train/grad_norm', 'eval/test/loss')
        }
    whole, parts = results['whole'], results['parts']
    assert whole['status'] == parts['status'] == 'finished'
    assert whole['digest'] == parts['digest']
    assert whole['data_digest'] == parts['data_digest']
    assert found['whole'] == found['parts']


@pytest.mark.slow
def test_the_digest_covers_step_row_and_example(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    """Also across a change of the batch size: the digest is a sum over (step, row, example)."""
    for size, total in ((32, '1 epochs'), (96, '2 epochs')):
        trainer_in(tmp_path, data__batch_size=size, train_for=total, evals={}).fit()
    words = [
        int(combine(step, row, example))
        for step, ids in ids_by_step.items()
        for row, example in enumerate(ids)
    ]
    assert command.result(tmp_path)['data_digest'] == f'{sum(words) % 2**64:016x}'


@pytest.mark.slow
def test_a_checkpoint_without_batch_sizes_has_that_of_its_config(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    trainer_in(tmp_path, data__batch_size=32, evals={}).fit()
    path = tmp_path / 'checkpoints' / '16' / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    for key in ('batch_sizes', 'examples', 'data'):
        del meta[key]
    path.write_text(json.dumps(meta))
    result = trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', evals={}).fit()
    assert result.step == 24
    assert usage_counts(ids_by_step) == {4: EXAMPLES}


@pytest.mark.slow
def test_a_stream_continues_at_its_position(
    tmp_path: pathlib.Path, ids_by_step: dict[int, list[int]]
) -> None:
    def train(workdir: pathlib.Path, batch_size: int, updates: int) -> None:
        experiment = load_and_build(
            str(ROOT / 'configs' / 'lm_packed.py'),
            model__layers=1, model__width=16, model__heads=2, evals={}, log__every='64 examples',
            train_for='160 examples', data__batch_size=batch_size,
        )  # fmt: skip
        Trainer(experiment, str(workdir), allow_config_change=True).fit(max_steps=updates)

    train(tmp_path / 'whole', 8, 20)
    whole = [example for step in sorted(ids_by_step) for example in ids_by_step[step]]
    assert len(whole) == 160
    ids_by_step.clear()
    train(tmp_path / 'two', 8, 10)
    train(tmp_path / 'two', 16, 2)
    train(tmp_path / 'two', 16, 9)
    assert [example for step in sorted(ids_by_step) for example in ids_by_step[step]] == whole
    assert command.result(tmp_path / 'two')['step'] == 15
    assert list(rows(tmp_path / 'two', 'train/loss')) == [8, 13, 15]


# ---- schedules ---------------------------------------------------------------------------------


def cosine(part: float) -> float:
    return 0.1 * 0.5 * (1 + math.cos(math.pi * part))


@pytest.mark.slow
@pytest.mark.parametrize('group', [False, True])
def test_a_schedule_in_epochs_continues_by_examples(
    group: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer: dict[str, Any] = {'optimizer__learning_rate': COSINE}
    if group:
        sgd = {'target': 'optax:sgd', 'learning_rate': COSINE}
        chain = {'target': 'optax:chain', 'args': ({'target': 'optax:clip', 'args': (1.0,)}, sgd)}
        optimizer = {
            'optimizer': {},
            'optimizer__groups': {'all': {'params': '.*', **chain}},
            'log__learning_rates': ('groups.all.args[1].learning_rate',),
        }
    more = {'train_for': '4 epochs', 'evals': {}, **optimizer}
    trainer_in(tmp_path, data__batch_size=32, **more).fit(max_steps=12)
    trainer_in(tmp_path, data__batch_size=64, **more).fit(max_steps=2)
    trainer_in(tmp_path, data__batch_size=128, **more).fit()
    name = 'train/learning_rate/all' if group else 'train/learning_rate'
    # The rate of an update is that of the examples before it.
    before = [32 * i for i in range(12)] + [384, 448] + [512, 640, 768, 896]
    assert list(rows(tmp_path, name).values()) == pytest.approx(
        [cosine(n / 1024) for n in before], rel=1e-5
    )
    out = capsys.readouterr().out
    assert (
        'in steps 12 to 22 they have the values of steps 6 to 16 of a run with batch size 64' in out
    )


@pytest.mark.slow
def test_a_schedule_in_steps_continues_by_steps(tmp_path: pathlib.Path) -> None:
    rate = {
        'target': 'optax:piecewise_constant_schedule', 'init_value': 0.1,
        'boundaries_and_scales': {'10 steps': 0.1, '18 steps': 0.1},
    }  # fmt: skip
    more = {'optimizer__learning_rate': rate, 'evals': {}}
    trainer_in(tmp_path, data__batch_size=32, **more).fit()
    trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', **more).fit()
    rates = rows(tmp_path, 'train/learning_rate')
    assert [rates[step] for step in (10, 11, 18, 19)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    'a number of steps': (
        {'target': 'optax:warmup_cosine_decay_schedule', 'init_value': 0.0, 'peak_value': 0.1,
         'warmup_steps': 10, 'decay_steps': '100%'},
        r"learning_rate\.warmup_steps: 10 counts steps, and .*learning_rate\.decay_steps counts "
        r"examples.*Write '320 examples'",
    ),
    'steps as a duration, and by position': (
        {'target': 'optax:warmup_cosine_decay_schedule', 'args': (0.0, 0.1, '4 steps', '2 epochs')},
        r"learning_rate\.args\[2\]: '4 steps' counts steps, and .*args\[3\].*Write '128 examples'",
    ),
    'a table': (
        {'target': 'optax:piecewise_constant_schedule', 'init_value': 0.1,
         'boundaries_and_scales': {'13 steps': 0.1, '3 epochs': 0.1}},
        r"boundaries_and_scales\.13 steps: '13 steps' counts steps.*Write '416 examples'",
    ),
    'a schedule within': (
        {'target': 'optax:join_schedules', 'boundaries': (4,), 'schedules': (
            {'target': 'optax:constant_schedule', 'value': 0.1}, COSINE)},
        r"boundaries\[0\]: 4 counts steps.*schedules\[1\]\.decay_steps.*Write '128 examples'",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(('rate', 'message'), REFUSED.values(), ids=REFUSED)
def test_a_schedule_of_steps_and_examples_is_refused(
    rate: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    more = {'optimizer__learning_rate': rate, 'evals__test__every': '1 epochs'}
    trainer_in(tmp_path, data__batch_size=32, **more).fit()
    before = (tmp_path / 'config.json').read_bytes()
    longer = trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', **more)
    with pytest.raises(UserError, match=message):
        longer.fit()
    assert (tmp_path / 'config.json').read_bytes() == before
    # What needs no schedule is not refused.
    assert longer.evaluate()['test']['examples'] == 100
    # And with the same size nothing is.
    again = trainer_in(tmp_path, data__batch_size=32, train_for='3 epochs', **more).fit()
    assert again.step == 24


@pytest.mark.slow
def test_a_schedule_that_cannot_be_adjusted_is_refused(tmp_path: pathlib.Path) -> None:
    every = {
        'target': 'optax:MultiSteps', 'every_k_schedule': '0.25 epochs',
        'opt': {'target': 'optax:sgd', 'learning_rate': 0.1},
    }  # fmt: skip
    more: dict[str, Any] = {'optimizer': every, 'evals': {}}
    trainer_in(tmp_path, data__batch_size=32, **more).fit()
    with pytest.raises(UserError, match=r"every_k_schedule: '0\.25 epochs' is a different number"):
        trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', **more).fit()


@pytest.mark.slow
def test_fields_replaced_in_python_are_not_rebuilt(tmp_path: pathlib.Path) -> None:
    """An experiment changed in Python may differ from its config."""
    experiment = load_and_build(str(ROOT / 'configs' / 'mnist_mlp.py'), data__batch_size=32)
    devices = dataclasses.replace(experiment.devices, mesh={'data': 2})
    mine = dataclasses.replace(experiment, hooks={'mine': print}, devices=devices)
    after = mine.with_batch_sizes(((0, 16), (5, 32)))
    assert (after.hooks, after.devices.mesh) == ({'mine': print}, {'data': 2})
    # 5 steps of 16 examples are 2.5 steps of 32.
    assert after.training.total_steps == experiment.training.total_steps + 3


@pytest.mark.slow
def test_members_of_an_ensemble_continue_by_examples(tmp_path: pathlib.Path) -> None:
    more = {
        'train_for': '4 epochs', 'evals': {}, 'optimizer__learning_rate': COSINE,
        'ensemble': {'size': 2, 'vary': {'optimizer.learning_rate.init_value': (0.1, 0.05)}},
    }  # fmt: skip
    trainer_in(tmp_path, data__batch_size=32, **more).fit(max_steps=16)
    trainer_in(tmp_path, data__batch_size=64, **more).fit()
    for member, factor in ((0, 1.0), (1, 0.5)):
        rates = rows(tmp_path, f'train/member_{member}/learning_rate')
        assert [rates[17], rates[24]] == pytest.approx(
            [factor * cosine(1 / 2), factor * cosine(15 / 16)], rel=1e-5
        )


# ---- what else looks at steps ------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_stays_finished_and_a_shorter_one_is_refused(tmp_path: pathlib.Path) -> None:
    trainer_in(tmp_path, data__batch_size=32, evals={}).fit()
    shorter = trainer_in(tmp_path, data__batch_size=64, train_for='1 epochs', evals={})
    with pytest.raises(UserError, match=r'is at step 16, but config\.train_for is only 8 steps'):
        shorter.check_workdir()
    unasked = Trainer(shorter.experiment, str(tmp_path))
    with pytest.raises(UserError, match=r'data\.batch_size +32 -> 64'):
        unasked.check_workdir()
    # As many epochs as it has.
    done = command.run(
        command.MLP, f'--workdir={tmp_path}', '--config.data.source.limit=256',
        '--config.evals={}', '--config.train_for=2epochs', '--config.data.batch_size=64',
        '--allow_config_change',
    )  # fmt: skip
    assert done.code == 0
    assert 'has already finished at step 16' in done.out


@pytest.mark.slow
def test_a_run_resumes_from_an_older_checkpoint(tmp_path: pathlib.Path) -> None:
    kept = {'checkpoint__every': '1 epochs', 'checkpoint__keep_last': 9, 'evals': {}}
    trainer_in(tmp_path, data__batch_size=32, **kept).fit()
    trainer = trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', **kept)
    trainer.fit()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == [8, 16, 20, 24]
    with trainer.batches(8, [1]) as batches, trainer.batches(20, [1]) as later:
        batch = next(iter(batches)).arrays
        other = next(iter(later)).arrays
    # After 256 examples, and after 768.
    data = trainer_in(None, data__batch_size=64).experiment.data
    np.testing.assert_array_equal(batch['label'], data.block(4, 1).arrays['label'][0])
    np.testing.assert_array_equal(other['label'], data.block(12, 1).arrays['label'][0])
    assert next_step_gradients(trainer, trainer.restore(8), ['Dense_0'])


@pytest.mark.slow
def test_checkpoints_are_kept_at_the_ends_of_epochs(tmp_path: pathlib.Path) -> None:
    kept = {
        'checkpoint__every': '0.5 epochs', 'checkpoint__keep_last': 1,
        'checkpoint__keep_every': '2 epochs', 'evals': {}, 'train_for': '6 epochs',
    }  # fmt: skip
    trainer_in(tmp_path, data__batch_size=32, **kept).fit(max_steps=20)
    trainer = trainer_in(tmp_path, data__batch_size=64, **kept)
    trainer.fit()
    assert trainer.checkpoints is not None
    # 2 epochs of 8 steps; half of one, and one and a half of 4 steps; two of 4.
    assert trainer.checkpoints.steps() == [16, 26, 34]


def test_the_profile_window_counts_examples() -> None:
    more = {'profile': {'start': '3 epochs', 'steps': 2}}
    experiment = trainer_in(None, data__batch_size=64, train_for='4 epochs', **more).experiment
    window = experiment.with_batch_sizes(((0, 32), (16, 64))).logging.profile
    assert window is not None
    assert (window.start, window.stop) == (20, 22)
    assert experiment.with_batch_sizes(((0, 64),)) is experiment
    assert (
        experiment.with_batch_sizes(((0, 32), (16, 64)))
        .with_batch_sizes(((0, 64),))
        .training.total_steps
        == 16
    )


@pytest.mark.slow
def test_a_run_continued_by_another_trainer_is_refused(tmp_path: pathlib.Path) -> None:
    early = trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', evals={})
    trainer_in(tmp_path, data__batch_size=32, evals={}).fit()
    with pytest.raises(UserError, match='has changed since this Trainer was created'):
        early.fit()


class Counting:
    """A user's own loader that supports only one batch size."""

    def __init__(
        self, *, source: Any, batch_size: int, transforms: Any, seed: int, shuffle: bool,
        remainder: str, repeat_batch: Any,
    ):  # fmt: skip
        from trainer.data.loader import TrainLoader

        self._inner = TrainLoader(source=source, batch_size=batch_size)
        for name in ('spec', 'steps_per_epoch', 'block', 'examples'):
            setattr(self, name, getattr(self._inner, name))


@pytest.mark.slow
def test_a_loader_without_support_for_resizing_is_refused(tmp_path: pathlib.Path) -> None:
    more = {'data__loader': {'target': f'{__name__}:Counting'}, 'evals': {}}
    trainer_in(tmp_path, data__batch_size=32, **more).fit()
    longer = trainer_in(tmp_path, data__batch_size=64, train_for='4 epochs', **more)
    with pytest.raises(UserError, match=r'Counting cannot resume .* batch size was 32'):
        longer.fit()
