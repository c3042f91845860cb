# SPDX-License-Identifier: Apache-2.0
"""A gcloud for tests, which runs the commands of two workers locally, each with its own home."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

from tests import command

LAUNCHER = command.ROOT / 'launch' / 'tpu_pod.py'
TRAINER = ('--', '--config=a b.py', '--workdir=gs://bucket/run')
MAKE = ('--accelerator_type=v4-16', '--version=v2', '--spot')

GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys

root = pathlib.Path(__file__).parent.parent
words = sys.argv[1:]
with open(root / 'calls', 'a') as calls:
    calls.write(json.dumps(words) + '\\n')
assert words[:2] == ['compute', 'tpus']
kind, verb, name = words[2:5]
flags = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
# One line per future call: its exit code and the state after it, or '-' for the real result.
failures = root / f'fail_{verb}'
if failures.exists() and failures.read_text():
    first, *rest = failures.read_text().splitlines(keepends=True)
    failures.write_text(''.join(rest))
    code, *state = first.split()
    if state:
        (root / 'state').write_text(state[0])
    if code != '-':
        sys.exit(int(code))
state = root / 'state'
if verb == 'describe':
    if not state.exists():
        sys.exit('NOT_FOUND')
    print('ACTIVE' if kind == 'queued-resources' else state.read_text())
elif verb == 'create':
    assert not state.exists(), 'ALREADY_EXISTS'
    state.write_text('READY')
elif verb == 'delete':
    state.unlink()
    for i in (0, 1):
        shutil.rmtree(root / f'home{i}', ignore_errors=True)
elif verb in ('ssh', 'scp'):
    codes = []
    for i in (0, 1) if flags['worker'] == 'all' else (int(flags['worker']),):
        home = root / f'home{i}'
        home.mkdir(exist_ok=True)
        if verb == 'scp':
            shutil.copy(words[4], home)
            continue
        env = {**os.environ, 'HOME': str(home), 'WORKER': str(i)}
        codes.append(subprocess.run(['bash', '-c', flags['command']], env=env, cwd=home).returncode)
    sys.exit(max(codes, default=0))
"""

CURL = """#!/bin/bash
case "$*" in
    *worker-network-endpoints) echo -n 'a:b:10.0.0.1,c:d:10.0.0.2' ;;
    *agent-worker-number) echo -n $WORKER ;;
esac
"""

PYTHON3 = """#!/bin/bash
echo "$@" >> "$HOME/python3"
if [ "$2 $3" = "uv venv" ]; then
    mkdir -p "${@: -1}/bin"
    ln -sf PYTHON "${@: -1}/bin/python"
fi
"""

# The workers look once a second whether a run has ended; here a second is short.
SLEEP = f"""#!/bin/bash
exec {shutil.which('sleep')} 0.01
"""

MAIN = """
import os, pathlib, sys, time
home = pathlib.Path(os.environ['HOME'])
print('trainer', *sys.argv[1:], flush=True)
codes = (home.parent / 'codes').read_text().split()
mine = home.parent / f'starts{home.name[-1]}'
number = int(mine.read_text()) if mine.exists() else 0
mine.write_text(str(number + 1))
if codes[number] == 'wait':
    time.sleep(1000)
if codes[number] == 'late':  # The second worker ends after the first one.
    time.sleep(0.5 * int(home.name[-1]))
    sys.exit(0)
sys.exit(int(codes[number]))
"""


class Cloud:
    """The calls of gcloud, and the files of the workers."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        bin = root / 'bin'
        bin.mkdir()
        tools = {
            'gcloud': f'#!{sys.executable}\n{GCLOUD}',
            'curl': CURL,
            'sleep': SLEEP,
            'python3': PYTHON3.replace('PYTHON', sys.executable),
        }
        for name, text in tools.items():
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        self.source = root / 'source'
        (self.source / 'trainer').mkdir(parents=True)
        (self.source / 'trainer' / 'main.py').write_text(MAIN)
        for words in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'one']):
            identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
            subprocess.run(['git', '-C', self.source, *identity, *words], check=True)
        self.will_exit(0)

    def will_exit(self, *codes: int | str) -> None:
        """Sets the exit code of each start of the trainer."""
        (self.root / 'codes').write_text(' '.join(map(str, codes)))

    def will_fail(self, verb: str, *failures: str) -> None:
        (self.root / f'fail_{verb}').write_text(''.join(f'{failure}\n' for failure in failures))

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # With the tests' PYTHONPATH, the workers would import the real trainer.
        inherited = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        return subprocess.run(
            [sys.executable, LAUNCHER, verb, 'pod', '--zone=z', *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={**inherited, 'PATH': f'{self.root}/bin:{os.environ["PATH"]}'},
        )

    def train(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        flags = (f'--source={self.source}', '--poll_secs=0.01', *MAKE, *arguments)
        return self.run('train', *flags, *TRAINER)

    def calls(self) -> list[list[str]]:
        path = self.root / 'calls'
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def verbs(self) -> list[str]:
        return [words[3] for words in self.calls() if words[3] != 'describe']

    def log(self, worker: int) -> str:
        return (self.root / f'home{worker}' / 'train' / 'log').read_text()
