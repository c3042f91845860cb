# SPDX-License-Identifier: Apache-2.0
"""Signals before the first step: during imports, in the config, during tracing."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import command
from tests.marks import slow_after
from trainer.parallel import signals

SLOW = """
import pathlib, time
import flax.linen as nn

def wait():
    pathlib.Path('began').touch()
    time.sleep(120)

class Slow(nn.Module):
    features: object = None

    @nn.compact
    def __call__(self, x):
        wait()
        return nn.Dense(10)(x.reshape(len(x), -1))

def hook(event):
    wait()
"""
# Python imports this module at its start. It leaves a file when the import of a library begins.
SITE = """
import pathlib, sys

class Mark:
    def find_spec(self, name, path=None, target=None):
        if name in ('absl', 'jaxlib', 'tensorstore'):
            pathlib.Path(f'imports {name}').touch()

sys.meta_path.insert(0, Mark())
"""
CONFIG = 'import slow\ndef get_config():\n    slow.wait()\n'


def start(where: pathlib.Path, *args: str, config: str = command.MLP) -> subprocess.Popen[str]:
    (where / 'slow.py').write_text(SLOW)
    (where / 'waits.py').write_text(CONFIG)
    (where / 'sitecustomize.py').write_text(SITE)
    if config == command.MLP:
        config = f'--config={command.ROOT}/configs/mnist_mlp.py'
    return command.start(config, f'--workdir={where / "run"}', *args, cwd=where, site=where)


def stages(where: pathlib.Path) -> dict[str, tuple[list[str], str]]:
    """Returns, for each stage, options of the command and the file that says it is reached."""
    slow_hook = '--config.hooks={"slow": {"ref": "slow:hook"}}'
    return {
        'first lines': ([], 'imports absl'),
        'jax': ([], 'imports jaxlib'),
        'config': (['config'], 'began'),
        'tracing': (['--config.model={"target": "slow:Slow"}'], 'began'),
        'orbax': ([], 'imports tensorstore'),
        'start': ([slow_hook], 'began'),
    }


def stop(where: pathlib.Path, stage: str, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal when the process has reached a stage; returns its exit code and output."""
    options, mark = stages(where)[stage]
    config = '--config=waits.py' if options == ['config'] else command.MLP
    process = start(where, *(o for o in options if o != 'config'), config=config)
    try:
        command.wait_for((where / mark).exists)
        process.send_signal(number)
        sent = time.monotonic()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - sent < 30
    return process.returncode, err


@pytest.mark.parametrize(
    'stage', slow_after(1, ['first lines', 'jax', 'config', 'tracing', 'orbax', 'start'])
)
def test_a_sigterm_before_the_first_step(tmp_path: pathlib.Path, stage: str) -> None:
    """Exit code 42 means: start it again. No work is lost yet."""
    code, err = stop(tmp_path, stage, signal.SIGTERM)
    assert (code, err) == (42, '\nSIGTERM: stopped before the first step; nothing is lost.\n')
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


@pytest.mark.parametrize('stage', slow_after(1, ['first lines', 'jax', 'tracing']))
def test_a_ctrl_c_before_the_first_step(tmp_path: pathlib.Path, stage: str) -> None:
    code, err = stop(tmp_path, stage, signal.SIGINT)
    assert (code, err) == (130, '\nSIGINT: stopped before the first step; nothing is lost.\n')


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_other_modes_end_by_the_default_action(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    process = start(tmp_path, '--mode', 'eval')
    command.wait_for((tmp_path / 'imports absl').exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-number, '', '')


@pytest.mark.slow
def test_sigusr2_prints_stacks_and_continues(tmp_path: pathlib.Path) -> None:
    process = start(tmp_path, config='--config=waits.py')
    try:
        command.wait_for((tmp_path / 'imports absl').exists)
        process.send_signal(signal.SIGUSR2)
        command.wait_for((tmp_path / 'began').exists)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 42
    assert err.startswith('Current thread') and 'trainer/main.py' in err


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ([], True),
        (['--config=mode', '--config.mode=eval'], True),
        (['--mode=eval'], False),
        (['-mode=plan'], False),
        (['--mode', 'export'], False),
        (['--mode=eval', '--mode=train'], True),
        (['mode=eval'], True),
        (['--mode'], False),
    ],
)
def test_is_training_command(words: list[str], expected: bool) -> None:
    assert signals.is_training_command(['main', *words]) == expected


def test_handlers_are_installed_before_other_imports() -> None:
    """Importing anything before the handlers are installed would leave a gap."""
    code = (
        'import sys; before = set(sys.modules)\n'
        'from trainer.parallel import signals\n'
        'from trainer.observe import stdio\n'
        'new = {name.partition(".")[0] for name in set(sys.modules) - before}\n'
        'print(sorted(new - set(sys.stdlib_module_names)), "dataclasses" in sys.modules)\n'
    )
    done = subprocess.run(
        [sys.executable, '-S', '-c', code], cwd=command.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "['trainer'] False\n", done.stderr
