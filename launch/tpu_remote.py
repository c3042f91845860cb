# SPDX-License-Identifier: Apache-2.0
"""What is run on each worker of a TPU: shell scripts, in and under `~/train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import common

ARCHIVE = 'train.tar.gz'  # In the home directory, where `scp` puts it.

UNPACK = f"""\
set -e
rm -rf ~/train/new
mkdir -p ~/train/new
tar -xzf ~/{ARCHIVE} -C ~/train/new
rm -rf ~/train/code ~/{ARCHIVE}
mv ~/train/new ~/train/code
"""

# The Python of a TPU's image may be too old, so uv brings one.
INSTALL = """\
set -e
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python {python} ~/train/venv
install="python3 -m uv pip install --quiet --python $HOME/train/venv/bin/python"
$install --require-hashes -r ~/train/code/requirements.lock
$install -e "$HOME/train/code[tpu]"
"""

ALIVE = 'kill -0 -- "-$(cat ~/train/pid 2> /dev/null)" 2> /dev/null'

END = f'while {ALIVE}; do sleep 1; done'

UNDER_WAY = {
    'refuse': f'if {ALIVE}; then echo "a run is under way already" >&2; exit 1; fi',
    'keep': f'if {ALIVE}; then exit 0; fi',
    'await': END,
}

_START = """\
set -e
{under_way}
cd ~/train/code
rm -f ~/train/exit
nohup setsid bash -c {loop} >> ~/train/log 2>&1 < /dev/null &
echo $! > ~/train/pid
"""

# Every worker leaves with 42 at the same step, so each may start again by itself; they meet anew.
_LOOP = """\
meta() {{
    curl -sf -H Metadata-Flavor:Google \\
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
workers=$(meta worker-network-endpoints) && number=$(meta agent-worker-number) || {{
    echo "this is no worker of a TPU: there is no metadata of one"
    exit 1
}}
cluster=()
if [[ "$workers" == *,* ]]; then
    first=${{workers%%,*}}
    commas=${{workers//[!,]/}}
    cluster=(--coordinator="${{first##*:}}:{port}" --num_processes=$((${{#commas}} + 1))
        --process_id="$number")
fi
for ((start = 0; start <= {restarts}; start++)); do
    ~/train/venv/bin/python -m trainer.main {trainer} "${{cluster[@]}}"
    code=$?
    [ $code = {preempted} ] || break
    echo "preempted and saved after start $((start + 1)) of $(({restarts} + 1))"
done
echo $code > ~/train/exit
"""

# The whole group: the loop goes at once, the trainer saves first.
STOP = 'kill -TERM -- "-$(cat ~/train/pid)"'

WAIT = f"""\
{END}
if [ ! -e ~/train/exit ]; then
    echo "the run was stopped, or never started" >&2
    exit 1
fi
exit "$(cat ~/train/exit)"
"""


def install(python: str) -> str:
    """Returns the script that makes the environment with this version of Python."""
    return INSTALL.format(python=shlex.quote(python))


def start(trainer: Sequence[str], restarts: int, under_way: str) -> str:
    """Returns the script that starts a run in the background.

    Args:
        trainer: arguments of the trainer.
        restarts: how often to start again after exit code 42.
        under_way: what to do about a run that has not ended: a key of `UNDER_WAY`.
    """
    loop = _LOOP.format(
        port=common.COORDINATOR_PORT,
        restarts=restarts,
        trainer=common.shown(trainer),
        preempted=common.EXIT_PREEMPTED,
    )
    return _START.format(under_way=UNDER_WAY[under_way], loop=shlex.quote(loop))


def logs(lines: int, follow: bool) -> str:
    """Returns the script that prints the end of the log, and what comes, if wanted."""
    return f'tail -n {lines} {"-F " if follow else ""}~/train/log'
