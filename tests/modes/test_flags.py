# SPDX-License-Identifier: Apache-2.0
"""Flags: what they accept, and what a mistake is answered with."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.command import ROOT
from trainer import main
from trainer.config.errors import UserError
from trainer.modes import flags
from trainer.parallel.signals import StopRequest


def parse(*words: str) -> None:
    flags.parse(['trainer', *words], has_config=True)


def test_flags_have_one_dash_or_two_and_their_value_may_be_the_next_word() -> None:
    parse('-mode', 'plan', '--devices=8', '--device_kind', 'h100')
    assert (flags.FLAGS.mode, flags.FLAGS.devices, flags.FLAGS.device_kind) == ('plan', 8, 'h100')


def test_a_call_forgets_the_flags_of_the_one_before() -> None:
    parse('--mode=export', '--platforms=cpu')
    parse()
    assert (flags.FLAGS.mode, flags.FLAGS.platforms) == ('train', ['cpu', 'cuda', 'tpu'])


def test_the_short_form_of_help() -> None:
    parse('-h')
    assert flags.FLAGS.help


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('--wrkdir=x',), 'Unknown flag --wrkdir. Did you mean --workdir?'),
        (('--mode=test',), "export, config, got 'test'. Did you mean --mode=eval?"),
        (('--mode',), 'Missing value for flag --mode. See --help.'),
        (('--mode', '--step=3'), "got '--step=3'"),
        (('--help=model',), "--help: expected true or false, got 'model'"),
        (('--devices=two',), "--devices: expected a positive integer, got 'two'"),
        (('--devices=0',), "--devices: expected a positive integer, got '0'"),
        (('--num_processes=x',), "--num_processes: expected an integer, got 'x'"),
        (('--device_kind=H100',), 'Did you mean --device_kind=h100?'),
        (('--mode=export', '--platforms=gpu'), 'Did you mean --platforms=cuda?'),
        (('--mode=export', '--platforms='), 'expected some of cpu, cuda, rocm, tpu, got nothing'),
        (('--mode=eval', '--step=bset'), "got 'bset'. Did you mean --step=best?"),
        (('--mode=eval', '--step=-3'), "--step: expected a step, 'latest' or 'best', got '-3'"),
        (('--step=3',), '--step requires --mode=eval, predict, export or grad_probe; --mode=train'),
        (('--devices=3',), '--devices requires --mode=plan; --mode=train does not use it'),
        (('eval',), "'eval' is not a flag. Did you mean --mode=eval?"),
    ],
)
def test_a_mistake_says_what_was_expected(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*words)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('--confg=configs/mnist.py',), 'Did you mean --config?'),
        (('mnist',), 'Did you mean --config=mnist?'),
        (('--config', '=', 'mnist'), "There is a space before '='"),
    ],
)
def test_a_mistyped_config_flag(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(['trainer', *words], StopRequest()) == 2
    assert message in capsys.readouterr().err


def test_the_keys_are_listed_without_a_config_and_without_jax() -> None:
    code = (
        'import sys\n'
        'from trainer import main\n'
        'from trainer.parallel.signals import StopRequest\n'
        "assert main.main(['x', '--helpconfig'], StopRequest()) == 0\n"
        "assert main.main(['x', '--help', '--helpconfig'], StopRequest()) == 0\n"
        "assert not {'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('All keys (type, default):\n')
    assert done.stdout.count('All keys (type, default):\n') == 2
    assert done.stdout.count('--[no]helpconfig') == 1
