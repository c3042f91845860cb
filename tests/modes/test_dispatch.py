# SPDX-License-Identifier: Apache-2.0
"""From a checked command line to its mode: exit codes, and records of runs that cannot start."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import ml_collections
import pytest

from tests.step import tiny
from trainer.config.errors import UserError
from trainer.config.loading import LoadedConfig
from trainer.modes import dispatch, flags
from trainer.modes.command import Command
from trainer.parallel.signals import StopRequest
from trainer.run.failure import NonFiniteError


def raise_error(**arguments: Any) -> Any:
    raise ZeroDivisionError('of the user')


def refuse() -> Any:
    raise UserError('refused')


def loaded_config(**changes: Any) -> LoadedConfig:
    config = ml_collections.ConfigDict()
    config.train_for = '1 steps'
    config.model = {'target': f'{tiny.__name__}:Net'}
    config.task = {'target': 'trainer.tasks:Classification', 'inputs': 'x'}
    config.optimizer = {'target': 'optax:sgd', 'learning_rate': 0.1}
    config.data = {'source': tiny.SOURCE, 'batch_size': 32}
    for name, value in changes.items():
        config[name] = value
    return LoadedConfig(config=config, name='small', arg='', path=pathlib.Path(__file__))


def command(mode: str, workdir: pathlib.Path, step: str = 'latest') -> Command:
    return Command(
        mode=mode, workdir=str(workdir), step=step, allow_config_change=False, overrides={}
    )


def test_every_mode_of_the_command_line_has_a_function() -> None:
    """`--mode=config` prints the config before anything is built."""
    names = set(flags.MODES) - {'config'}
    functions = {dispatch._mode_function(name) for name in names}
    assert len(functions) == len(names) == len(flags.MODES) - 1


def test_a_mode_prints_and_returns_its_exit_code(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = dispatch.run(loaded_config(), command('summary', tmp_path / 'run'), StopRequest())
    assert code == 0
    assert 'starting from scratch' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', ['train', 'summary'])
def test_an_error_of_user_code_is_recorded_for_training_only(
    mode: str, tmp_path: pathlib.Path
) -> None:
    broken = loaded_config(task={'target': f'{__name__}:raise_error'})
    with pytest.raises(ZeroDivisionError):
        dispatch.run(broken, command(mode, tmp_path / 'run'), StopRequest())
    assert (tmp_path / 'run').exists() == (mode == 'train')
    if mode == 'train':
        result = json.loads((tmp_path / 'run' / 'result.json').read_text())
        assert (result['status'], result['step']) == ('failed', 0)
        assert 'of the user' in json.dumps(result['error'])


def test_a_mistake_in_the_config_leaves_no_work_directory(tmp_path: pathlib.Path) -> None:
    broken = loaded_config(task={'target': f'{__name__}:refuse'})
    with pytest.raises(UserError, match='refused'):
        dispatch.run(broken, command('train', tmp_path / 'run'), StopRequest())
    assert not (tmp_path / 'run').exists()


def test_a_mode_that_reads_a_run_names_the_missing_one(tmp_path: pathlib.Path) -> None:
    evaluated = loaded_config(evals={'test': tiny.EVAL})
    with pytest.raises(UserError, match=r'no run in .*none: the directory does not exist'):
        dispatch.run(evaluated, command('eval', tmp_path / 'none'), StopRequest())


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_its_own_exit_code(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steep = loaded_config(
        train_for='8 steps',
        optimizer={'target': 'optax:sgd', 'learning_rate': 1e30},
        log={'every': '4 steps', 'tensorboard': False},
    )
    code = dispatch.run(steep, command('train', tmp_path / 'run'), StopRequest())
    assert code == NonFiniteError.exit_code != 0
    printed = capsys.readouterr().err
    assert 'Error: ' in printed and 'Traceback' not in printed


def test_without_a_home_directory_programs_are_not_cached(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    monkeypatch.setenv('XDG_CACHE_HOME', '~no_such_user/cache')
    assert dispatch.run(loaded_config(), command('summary', tmp_path), StopRequest()) == 0
    assert 'no home directory, so compiled programs are not cached' in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before
