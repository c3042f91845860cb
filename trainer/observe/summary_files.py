# SPDX-License-Identifier: Apache-2.0
"""Files of summaries and arrays in the work directory.

A summary named `eval/dev/samples` of step 300 is the file `summaries/300/eval/dev/samples.txt`:
`.txt` for texts, `.png` for images and figures, `.npz` for arrays and histograms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from etils import epath

from trainer.config.errors import UserError
from trainer.observe.summaries import Summary

# File systems allow 255 bytes, of which the suffixes of a file and of its temporary copy are some.
_MAX_BYTES = 200
# Control characters, and what Windows or a shell gives a meaning.
_REFUSED = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


def check_name(name: str) -> None:
    """Checks that a summary's name can be a path below a directory.

    Raises:
        UserError: if it is absolute, leaves the directory, or has a part that a file system
            refuses.
    """
    for part in name.split('/'):
        is_long = len(part.encode(errors='replace')) > _MAX_BYTES
        if part != part.strip() or part in ('', '.', '..') or is_long or _REFUSED.search(part):
            raise UserError(
                f'a summary is named {name!r}, which cannot be the name of a file: expected parts '
                f"of at most {_MAX_BYTES} bytes between '/', none of them empty, '.' or '..', "
                'without spaces around them, control characters and \\ : * ? " < > |'
            )


def write_files(directory: epath.Path, step: int, summaries: Mapping[str, Summary]) -> list[str]:
    """Writes the files of the summaries of a step.

    Args:
        directory: work directory of the run.
        step: number of completed steps.
        summaries: summaries by name, such as `eval/dev/samples`.

    Returns:
        Their paths.
    """
    paths = []
    for name, summary in summaries.items():
        stem = directory / 'summaries' / str(step) / name
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths.append(str(summary.write(stem)))
    return paths


def remove_after(directory: epath.Path, step: int) -> None:
    """Removes the summaries and the arrays of metrics of later steps, like the rows of a resume.

    Args:
        directory: work directory of the run.
        step: the step that the run resumes from.
    """
    for path in _children(directory / 'summaries'):
        if path.name.isdecimal() and int(path.name) > step:
            path.rmtree()
    for path in _children(directory / 'metrics'):
        match = re.fullmatch(r'.*_(\d+)\.npz', path.name)
        if match and int(match[1]) > step:
            path.unlink()


def _children(directory: epath.Path) -> list[epath.Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
