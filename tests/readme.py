# SPDX-License-Identifier: Apache-2.0
"""What the README shows, taken apart: files, fragments of configs, commands; and how they run."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

from tests import command

README = (command.ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w*)\n(.*?)```', README, flags=re.DOTALL)
SENTENCES = re.sub(r'```.*?```', '', README, flags=re.DOTALL)

_PYTHON = [text for kind, text in BLOCKS if kind == 'python']
FILES = {match[1]: text for text in _PYTHON if (match := re.match(r'# ([\w/]+\.py)\n', text))}
_PIECES = [text for text in _PYTHON if text not in FILES.values()]
_IS_FRAGMENT = re.compile(r'^(c|config)\.', flags=re.MULTILINE)
# Lines for a config file: blocks of them, and those within a sentence.
FRAGMENTS = [text for text in _PIECES if _IS_FRAGMENT.search(text)]
FRAGMENTS += re.findall(r'`((?:c|config)\.[\w.]+ = [^`]+)`', SENTENCES)
# Neither files nor fragments.
OTHERS = [text for text in _PIECES if text not in FRAGMENTS]
COMMANDS = [
    line.split('   #')[0].strip()
    for kind, text in BLOCKS
    if kind == 'bash'
    for line in text.splitlines()
]
OVERRIDES = re.findall(r'`(--config\.[^`]+=[^`]+)`', SENTENCES)
TEXTS = [text.replace('\\\n', ' ') for kind, text in BLOCKS if kind == 'text']

QUICKSTART, TESTS = COMMANDS[:2]
PRETRAINED = 'python -m trainer.main --config=configs/mnist_mlp.py --workdir=runs/pretrained'
EXPORT = f'{PRETRAINED} --mode=export'
STEPS = 3


class Project:
    """A directory of the user's own, with the README's files and nothing of ours."""

    def __init__(self, root: pathlib.Path, python: str = sys.executable):
        """Writes the files.

        Args:
            root: the directory.
            python: runs commands and scripts: this one, with the checkout, or one with the wheel.
        """
        self.root = root
        self.python = python
        self._ran: dict[str, command.Finished] = {}
        for name, text in FILES.items():
            (root / name).parent.mkdir(exist_ok=True)
            # The run that is exported is shorter here, and so is that of the language model.
            text = text.replace('export_18750', f'export_{STEPS}')
            (root / name).write_text(text.replace("train_for='50 ", f"train_for='{STEPS} "))

    def run(self, line: str) -> command.Finished:
        """Runs a command of the README, once, after those that it needs."""
        if line not in self._ran:
            for other in needs(line):
                self.run(other)
            self._ran[line] = run(line, self.root, python=self.python)
            assert self._ran[line].code == 0, self._ran[line].err
        return self._ran[line]

    def script(self, name: str) -> str:
        """Returns what one of the files prints, after the commands that it needs."""
        for other in needs(FILES[name]):
            self.run(other)
        done = subprocess.run(
            [self.python, name],
            cwd=self.root,
            env=command.environment(self.python),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def needs(text: str) -> list[str]:
    """Returns the commands whose results a command, a file or a fragment reads."""
    found = []
    if '--mode=eval' in text or '--mode=predict' in text:
        found.append(QUICKSTART)
    if ('runs/pretrained' in text or 'transfer/digits.py' in text) and text != PRETRAINED:
        found.append(PRETRAINED)
    if 'runs/pretrained/export_' in text:
        found.append(EXPORT)
    if 'runs/sweep' in text and '--workdir=runs/sweep' not in text:
        found += [line for line in COMMANDS if '--workdir=runs/sweep' in line]
    return found


def run(line: str, cwd: pathlib.Path, *more: str, python: str = sys.executable) -> command.Finished:
    """Runs a line of the README as it stands, but for a shorter run and evaluation."""
    name, *args = shlex.split(line)
    devices = 1
    if match := re.fullmatch(r'XLA_FLAGS=--xla_force_host_platform_device_count=(\d)', name):
        devices, (name, *args) = int(match[1]), args
    assert name in ('python', 'launch/local.sh')
    args = args[args.index('-m') + 2 :] if name == 'python' else args
    if 'helpconfig' not in line and '=mine/' not in line:
        args.append(f'--config.train_for={STEPS}steps')
    if 'configs/lm' in line and 'mode=' not in line:
        args += ['--config.evals={}', '--config.model.layers=2']
    elif 'configs/mnist_resnet' in line:
        args.append('--config.evals={}')
    elif 'configs/mnist' in line and 'evals={}' not in line:
        args.append('--config.evals.test.data.source.limit=1000')
    return command.run(*args, *more, cwd=cwd, devices=devices, python=python)
