# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the command line, and in a notebook that calls `fit` repeatedly."""

from __future__ import annotations

import gc
import pathlib
import re
import shutil
import threading

import pytest

from tests import command
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

# The highest loss is that of the first evaluation: the best step is not the newest.
WORST_IS_BEST = (
    '--config.train_for=60steps',
    '--config.checkpoint.every=20steps',
    '--config.checkpoint.keep_last=1',
    '--config.checkpoint.best={"metric": "eval/test/loss", "mode": "max"}',
    '--config.evals.test.every=20steps',
    '--config.log.every=20steps',
)


@pytest.fixture(scope='module')
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    command.train(workdir, *WORST_IS_BEST)
    return workdir


def run_mode(workdir: pathlib.Path, *args: str) -> command.Finished:
    return command.run(command.MLP, *command.SMALL, *WORST_IS_BEST, f'--workdir={workdir}', *args)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    files = (p for p in directory.rglob('*') if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'step'), [('best', 20), ('20', 20), ('60', 60), ('latest', 60)])
def test_eval_of_a_step(trained_run: pathlib.Path, name: str, step: int) -> None:
    """The metrics are those of the run at that step, and the directory does not change."""
    before = contents(trained_run)
    done = run_mode(trained_run, '--mode=eval', f'--step={name}')
    assert done.code == 0, done.err
    assert f'checkpoint of step {step} in {trained_run}' in done.out
    (then,) = (
        row for row in command.rows(trained_run) if row['step'] == step and 'eval/test/loss' in row
    )
    for metric in ('loss', 'accuracy'):
        found = re.search(rf'{metric} (\S+)', done.out)
        assert found is not None
        assert float(found[1]) == pytest.approx(then[f'eval/test/{metric}'], rel=1e-5)
    assert contents(trained_run) == before


@pytest.mark.slow
def test_the_best_needs_a_metric(trained_run: pathlib.Path) -> None:
    options = (command.MLP, *command.SMALL, f'--workdir={trained_run}', '--mode=eval')
    done = command.run(*options, '--step=best')
    assert done.code == 2
    assert 'Add --config.checkpoint.best.metric' in done.err


@pytest.mark.slow
def test_eval_of_a_missing_step(trained_run: pathlib.Path) -> None:
    done = run_mode(trained_run, '--mode=eval', '--step=40')
    assert done.code == 2
    assert "no checkpoint '40'" in done.err and 'available: 20, 60' in done.err


@pytest.mark.slow
def test_another_model_lists_the_leaves(trained_run: pathlib.Path) -> None:
    done = run_mode(trained_run, '--mode=eval', '--config.model.features=(32, 10)')
    assert done.code == 2
    assert (
        'params/Dense_0/kernel: float32[784, 64] in the checkpoint, float32[784, 32] in' in done.err
    )
    assert 'Traceback' not in done.err


@pytest.mark.slow
def test_a_damaged_checkpoint_has_its_exit_code(trained_run: pathlib.Path) -> None:
    (path,) = (trained_run / 'checkpoints' / '20' / 'state').glob('_METADATA')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = run_mode(trained_run, '--mode=eval', '--step=20')
    path.write_bytes(whole)
    assert done.code == 65
    assert done.err.startswith(f'Error: {trained_run}/checkpoints/20 is damaged: ')
    assert 'Traceback' not in done.err


@pytest.mark.slow
def test_repeated_fits_leave_no_threads(tmp_path: pathlib.Path) -> None:
    def threads() -> set[threading.Thread]:
        # Those that compile are of the process, at most two.
        return {t for t in threading.enumerate() if not t.name.startswith('compile')}

    gc.collect()
    before, trainers = threads(), []
    for name in ('one', 'two', 'three'):
        experiment = load_and_build(
            str(command.ROOT / 'configs' / 'mnist_mlp.py'), train_for='6 steps',
            data__source__limit=640, evals__test__data__source__limit=100,
            checkpoint__every='2 steps',
        )  # fmt: skip
        trainers.append(Trainer(experiment, str(tmp_path / name)))
        trainers[-1].fit(max_steps=4)
        trainers[-1].fit()
        trainers[-1].restore('latest')
        command.wait_for(lambda: threads() <= before)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['copied', 'linked', 'renamed'])
def test_a_renamed_checkpoint_is_refused(trained_run: pathlib.Path, how: str) -> None:
    """The digest matches the arrays; only the step does not match the directory name."""
    checkpoints = trained_run / 'checkpoints'
    other, original = checkpoints / '50', checkpoints / '60'
    make = {
        'copied': lambda: shutil.copytree(original, other),
        'linked': lambda: other.symlink_to(original),
        'renamed': lambda: original.rename(other),
    }
    make[how]()
    try:
        done = run_mode(trained_run, '--mode=eval', '--step=50')
    finally:
        if how == 'renamed':
            other.rename(original)
        elif how == 'linked':
            other.unlink()
        else:
            shutil.rmtree(other)
    assert done.code == 65
    rest = {'renamed': '20'}.get(how, '20, 60')
    assert done.err == (
        f'Error: {other} is not the checkpoint of step 50: its metadata says 60 and its state '
        f'says 60. It was copied, renamed or linked. Other checkpoints: {rest}.\n'
    )
