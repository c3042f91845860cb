# SPDX-License-Identifier: Apache-2.0
"""Shell scripts that run on each worker of a TPU; their files are in `~/train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import common

# In the home directory, where `scp` puts it.
ARCHIVE = 'train.tar.gz'

# Into a new directory that then replaces the old one: an interrupted copy leaves no mixture.
UNPACK = f"""\
set -e
rm -rf ~/train/new
mkdir -p ~/train/new
tar -xzf ~/{ARCHIVE} -C ~/train/new
rm -rf ~/train/code ~/{ARCHIVE}
mv ~/train/new ~/train/code
"""

# The Python of a TPU image may be too old, so uv installs one.
INSTALL = """\
set -e
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python {python} ~/train/venv
install="python3 -m uv pip install --quiet --python $HOME/train/venv/bin/python"
$install --require-hashes -r ~/train/code/requirements.lock
$install -e "$HOME/train/code[tpu]"
"""

# Whether any process of the run's group exists: signal 0 only checks.
ALIVE = 'kill -0 -- "-$(cat ~/train/pid 2> /dev/null)" 2> /dev/null'

END = f'while {ALIVE}; do sleep 1; done'

IF_RUNNING = {
    'refuse': f'if {ALIVE}; then echo "a run is already in progress" >&2; exit 1; fi',
    'keep': f'if {ALIVE}; then exit 0; fi',
    'await': END,
}

# In a session of its own, so that the run outlives the connection, and can be stopped as a group.
_START = """\
set -e
{if_running}
cd ~/train/code
rm -f ~/train/exit
nohup setsid bash -c {loop} >> ~/train/log 2>&1 < /dev/null &
echo $! > ~/train/pid
"""

# Every worker exits with code 42 at the same step, so each one can restart the trainer by itself.
# The coordinator is worker 0, the first in the list of endpoints.
_LOOP = """\
meta() {{
    curl -sf -H Metadata-Flavor:Google \\
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
workers=$(meta worker-network-endpoints) && number=$(meta agent-worker-number) || {{
    echo "this machine is not a TPU worker: it has no TPU metadata"
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

# To the whole group: the loop ends at once, so it cannot restart the trainer, which saves first.
STOP = 'kill -TERM -- "-$(cat ~/train/pid)"'

WAIT = f"""\
{END}
if [ ! -e ~/train/exit ]; then
    echo "the run was stopped, or never started" >&2
    exit 1
fi
exit "$(cat ~/train/exit)"
"""


def install_script(python: str) -> str:
    """Returns the script that installs the environment with this version of Python."""
    return INSTALL.format(python=shlex.quote(python))


def start_script(trainer: Sequence[str], restarts: int, if_running: str) -> str:
    """Returns the script that starts a run in the background.

    Args:
        trainer: arguments of the trainer.
        restarts: maximum number of restarts after exit code 42.
        if_running: what to do if a run is in progress: a key of `IF_RUNNING`.
    """
    loop = _LOOP.format(
        port=common.COORDINATOR_PORT,
        restarts=restarts,
        trainer=common.quote_command(trainer),
        preempted=common.EXIT_PREEMPTED,
    )
    return _START.format(if_running=IF_RUNNING[if_running], loop=shlex.quote(loop))


def logs_script(lines: int, follow: bool) -> str:
    """Returns the script that prints the end of the log.

    Args:
        lines: number of lines at the end of the log.
        follow: whether to keep printing new lines.
    """
    return f'tail -n {lines} {"-F " if follow else ""}~/train/log'
