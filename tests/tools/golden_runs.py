# SPDX-License-Identifier: Apache-2.0
"""Makes the runs in `tests/golden_runs/`, which every later version must be able to resume.

    python tests/tools/golden_runs.py

Run it once for each released version, and keep those of earlier versions.
"""

from __future__ import annotations

import pathlib
import sys
import tarfile
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.checkpoint.golden import DIRECTORY, KINDS, STEPS, make_trainer  # noqa: E402

PRIVATE = ('events.', 'debug.', 'log.', '.lock', 'run.json', 'code.diff', 'config.diff')


def main() -> None:
    """Writes an archive for each kind of state."""
    version = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']
    for kind in KINDS:
        archive = DIRECTORY / version / f'{kind}.tar.gz'
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            workdir = pathlib.Path(directory) / kind
            make_trainer(kind, workdir).fit(max_steps=STEPS)
            with tarfile.open(archive, 'w:gz') as tar:
                tar.add(workdir, kind, filter=keep_run)
        print(f'{archive.relative_to(ROOT)}: {archive.stat().st_size:,} bytes')


def keep_run(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leaves out logs, events and what is about the computer."""
    name = pathlib.PurePath(entry.name).name
    if name.startswith(PRIVATE):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ''
    return entry


if __name__ == '__main__':
    main()
