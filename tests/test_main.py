# SPDX-License-Identifier: Apache-2.0
"""User errors: exit code 2, no traceback, and a suggestion."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import command
from trainer import main
from trainer.parallel.signals import StopRequest

CNN = f'--config={command.ROOT}/configs/mnist.py'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((CNN, '--config.modle.hidden=3'), 'Did you mean config.model.hidden?'),
        ((CNN, '--config.data.batch_size=3.5'), 'expected int'),
        pytest.param(
            (CNN, '--config.mesh.data=3'),
            'does not fit 1 device. The sizes must multiply to 1; ',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (CNN, '--config.task.label=klass'),
            'image: float32[32, 28, 28, 1], label: int32[32]',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (CNN, '--config.early_stopping={"metric": "eval/test/loss/x", "mode": "min"}'),
            "config.early_stopping.metric: evaluation 'test' has no 'loss/x'",
            marks=pytest.mark.slow,
        ),
        (('--config=configs/mnst.py',), 'Did you mean configs/mnist.py?'),
        ((CNN, 'stray'), "'stray' is not a flag"),
        ((CNN, '--wrkdir=x'), 'Unknown flag --wrkdir. Did you mean --workdir?'),
        pytest.param(
            (CNN, '--mode=eval', '--workdir=nowhere'),
            'no run in nowhere: the directory does not exist',
            marks=pytest.mark.slow,
        ),
        ((), '--config is missing'),
    ],
)
def test_mistake(args: tuple[str, ...], message: str, tmp_path: pathlib.Path) -> None:
    """The message has the key, the problem and the fix, without a traceback."""
    finished = command.run(*args, cwd=tmp_path)
    assert finished.code == 2, finished.err
    assert message in finished.err
    assert 'Traceback' not in finished.err
    assert finished.out == ''


@pytest.mark.slow
def test_out_of_memory_names_what_fills_the_memory(tmp_path: pathlib.Path) -> None:
    finished = command.run(CNN, '--config.model.hidden=100000000', f'--workdir={tmp_path / "run"}')
    assert finished.code == 1
    for word in ('out of memory', 'train state  2.5 TB', 'batch        25.2 kB', 'temporaries'):
        assert word in finished.err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_without_progress_at_once(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    (tmp_path / 'slow.py').write_text(
        'import pathlib, time\n'
        "def get_config():\n    pathlib.Path('began').touch()\n    time.sleep(120)\n"
    )
    process = command.start('--config=slow.py', '--mode=eval', cwd=tmp_path)
    command.wait_for((tmp_path / 'began').exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-number, '', '')


@pytest.mark.slow
def test_output_in_a_pipe_has_no_control_characters(tmp_path: pathlib.Path) -> None:
    finished = command.train(tmp_path / 'run', '--config.train_for=300steps')
    assert not set(finished.out + finished.err) & set('\r\x1b\b')
    assert finished.err == ''
    assert 'step 200/300 (66%)  loss' in finished.out
    for derived in ('50,890 parameters', 'batch size   32 (32 per device)', 'epochs of 125 steps'):
        assert derived in finished.out


@pytest.mark.slow
def test_tensorflow_is_never_imported() -> None:
    code = (
        'import sys, trainer.modes.dispatch\n'
        'from trainer.experiment import load_and_build\n'
        'from trainer.trainer import Trainer\n'
        "experiment = load_and_build('configs/mnist_mlp.py', train_for='3 steps')\n"
        'result = Trainer(experiment).fit()\n'
        "assert result.status == 'finished' and result.step == 3, result\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, '-c', code], cwd=command.ROOT, check=True, timeout=120)


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Restores the signal handlers, which the command line replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures('own_handlers')
@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('import nosuch\n', "No module named 'nosuch'"),
        ('def get_config(:\n', 'SyntaxError'),
        ('x = 1\n', 'has no function get_config()'),
        ('def get_config():\n    return 1 / 0\n', 'ZeroDivisionError: division by zero'),
        ('def get_config():\n    return {}\n', 'must return an ml_collections.ConfigDict'),
        (
            'import ml_collections\n\n\ndef get_config():\n'
            "    return ml_collections.ConfigDict({'vary': {'optimizer.learning_rate': (1, 2)}})\n",
            "Nest dicts instead: {'optimizer': {'learning_rate': ...}}",
        ),
    ],
)
def test_broken_config_file(
    text: str,
    message: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / 'mine.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main.main(['trainer', '--config=mine.py'], StopRequest()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert 'mine.py' in printed.err
    assert 'Traceback' not in printed.err


@pytest.mark.usefixtures('own_handlers')
@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            (CNN, '--config.optimizer.learning_rat=1'),
            'Did you mean config.optimizer.learning_rate?',
        ),
        ((CNN, '--config.model.learning_rate=1'), 'Did you mean config.optimizer.learning_rate?'),
        ((CNN, '--config.optimizer={"learning_rat": 1}'), 'mean config.optimizer.learning_rate?'),
        ((CNN, '--config.batch_size=1'), 'Did you mean config.data.batch_size?'),
        ((CNN, '--config.evals.tset.every=3steps'), 'Did you mean config.evals.test.every?'),
        (
            (CNN, '--config.model.target=trainer.models.cnn:CN'),
            'Did you mean trainer.models.cnn:CNN?',
        ),
        ((CNN, '--config.model.target=models.cn:CNN'), 'Did you mean trainer.models.cnn:CNN?'),
        ((CNN, '--config.train_for=5'), 'write a number and a unit'),
        ((CNN, '--config.train_for=5%'), 'cannot be used here'),
        ((CNN, '--config.data.remainder=keep'), "'carry', 'pad', 'drop'"),
        ((CNN, '--config.optimizer.freeze=Dense'), 'must match a whole path'),
        ((CNN, '--config.optimizer.decay_mask=.*kernel'), 'no weight decay to mask'),
        (
            (CNN, '--config.optimizer.lr_multipliers=(("Conv.*",0.1),)'),
            'no pattern matches',
        ),
        (
            (CNN, '--config.data.batch_size=31'),
            'is not divisible by 8 devices x 1 micro-batch (config.accumulate); use 24 or 32',
        ),
        ((CNN, '--config.accumulate=5'), 'micro-batches (config.accumulate); use 40'),
        (
            (CNN, '--config.accumulate=5', '--mode=summary'),
            'micro-batches (config.accumulate); use 40',
        ),
        ((CNN, '--config.evals.test.ema=true'), 'set config.ema.decay'),
        ((CNN, '--config.checkpoint.best.metric=accuracy'), 'expected eval/test/...'),
        (
            (CNN, '--config.checkpoint.best={"metric": "eval/test/acuracy", "mode": "max"}'),
            "evaluation 'test' has no 'acuracy'; it has loss, accuracy, examples",
        ),
        (
            (CNN, '--config.checkpoint.best.metric=eval/test/acuracy'),
            "config.checkpoint.best.metric: no metric 'acuracy'; did you mean 'accuracy'? "
            "(Otherwise set config.checkpoint.best.mode to 'min' or 'max'.)",
        ),
        ((CNN, '--lr=3'), 'Did you mean --config.optimizer.learning_rate?'),
        ((CNN, '--batch_size=3'), 'Did you mean --config.data.batch_size?'),
        (
            (CNN, '--optimizer.momentum=0'),
            'need the prefix: --config.optimizer.momentum=VALUE',
        ),
        ((CNN, '--config.optimizer=optax:adam'), 'mean config.optimizer.target=optax:adam?'),
        ((CNN, '--config.init_from=runs/a'), 'Did you mean config.init_from.path=runs/a?'),
        ((CNN, '--config.hooks.x=mine:hook'), '--config.hooks.x=\'{"target": "mine:hook"}\' to'),
        ((CNN, '--config.evals={1: 2}', '--mode=config'), 'expected names as the keys of a dict'),
        ((CNN, '--config.guard={"nosuch": 1}', '--mode=config'), 'config.guard has: non_finite'),
        ((CNN, '--mode=trian'), "got 'trian'. Did you mean --mode=train?"),
        (
            (CNN, '--mode=eval', '--workdir=nowhere'),
            'no run in nowhere: the directory does not exist',
        ),
        ((CNN, '--config.mesh.data=3'), 'does not fit 8 devices. The sizes must multiply to 8; '),
    ],
)
def test_mistakes_before_training(
    args: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(['trainer', *args], StopRequest()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ''


@pytest.mark.usefixtures('own_handlers')
@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((CNN, '--config.mesh={}'), 'config.mesh: {} does not fit'),
        ((CNN, '--config.mesh={"data": 0, "model": -1}'), 'does not fit'),
        ((CNN, '--config.train_for=1e99 steps'), 'the maximum is 2^31 - 1'),
        ((CNN, '--config.ema.decay=2'), 'config.ema.decay: expected a number in [0, 1)'),
        ((CNN, '--config.task.top_k=5'), 'expected tuple[int, ...], got 5'),
        ((CNN, '--config.task.top_k=(5, "a")'), "top_k[1]: expected int, got 'a'"),
        ((CNN, '--config=configs/lm.py'), '--config is given twice'),
        ((CNN, '--workdir', '--mode=summary'), '--workdir needs a value'),
        ((CNN, '--workdir='), '--workdir needs a value'),
        (
            (CNN, '--config.data.source.target=trainer.data.tfds:TFDS'),
            'config.data.source.name is missing',
        ),
        (
            (
                CNN,
                '--config.data.source.target=trainer.data.tfds:TFDS',
                '--config.data.source.nam=mnist',
            ),
            'Did you mean config.data.source.name?',
        ),
        ((f'{CNN}:big',), "get_config() takes no argument, got 'big'"),
        ((CNN, '--config.data.batch_size', 'many'), "expected int, got 'many'"),
        ((CNN, '--config.data.batch_size=1e3'), 'expected int, got 1000.0'),
        ((CNN, '--config.data.batch_size=-4'), 'expected a positive number'),
        ((CNN, '--config.seed.x=1'), 'Did you mean config.seed?'),
        ((CNN, '--config.data..batch_size=1'), 'not a path'),
        ((CNN, '--config.model={}'), "expected an object, a dict with 'target'"),
        ((CNN, '--config.model={"hidden": '), "expected an object, a dict with 'target'"),
        ((CNN, '--config.optimizer={}'), 'config.optimizer.target is missing'),
        ((CNN, '--config.evals.test={}'), 'config.evals.test.data is missing'),
        (('--config=mnist_mpl',), 'Did you mean configs/mnist_mlp.py?'),
        (('--config=configs.mnist_mlp',), 'Did you mean configs/mnist_mlp.py?'),
        ((CNN, '--config.optimizer.target=optax'), "expected 'package.module:Name'"),
        ((CNN, '--config.optimizer.target=optax.adam'), 'Did you mean optax:adam?'),
        ((CNN, '--config.model.target=flax.linen.Dense'), 'Did you mean flax.linen:Dense?'),
        ((CNN, '--config.optimizer.target=optax:__version__'), 'is not callable'),
        ((CNN, '--config.model.target=builtins:int'), 'accepts_any=True'),
        ((CNN, '--config.optimizer.learning_rate=fast'), "expected float, got 'fast'"),
        ((CNN, '--config.precision.compute=float8'), "'float8' is none of"),
        ((CNN, '--config.data.device_transforms[5].key=x'), 'there is 1 element;'),
        (
            (CNN, '--step=5'),
            '--step requires --mode=eval, predict, export or grad_probe; --mode=summary',
        ),
        ((CNN, '--match=Conv.*'), '--match requires --mode=grad_probe; --mode=summary does not'),
        ((CNN, '--devices=3'), '--devices requires --mode=plan'),
        (('--config=configs',), "'configs' is a directory"),
        (('--config=pyproject.toml',), 'is not a Python file'),
    ],
)
def test_mistakes_in_this_process(
    args: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(command.ROOT)
    assert main.main(['trainer', *args, '--mode=summary'], StopRequest()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ''


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mode', 'buffered'),
    [
        ('--helpconfig', '1'),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ('--helpconfig', ''),
                ('--mode=config', ''),
                ('--mode=config', '1'),
                ('--mode=grad_probe', ''),
                ('--mode=grad_probe', '1'),
            ]
        ),
    ],
)
def test_output_to_a_closed_pipe(mode: str, buffered: str, tmp_path: pathlib.Path) -> None:
    """As with `| head`: no traceback, and files are written before output is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [command.MLP, f'--workdir={tmp_path}', mode]
    if mode == '--mode=grad_probe':
        arguments.append('--match=Dense_.*')
    done = subprocess.run(
        [sys.executable, '-m', 'trainer.main', *arguments],
        cwd=command.ROOT,
        env={**os.environ, 'XLA_FLAGS': command.xla_flags(), 'PYTHONUNBUFFERED': buffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, '')
    if mode == '--mode=grad_probe':
        assert [file.name for file in tmp_path.iterdir()] == ['gradients_0.npz']
