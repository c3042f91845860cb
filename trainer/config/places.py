# SPDX-License-Identifier: Apache-2.0
"""Paths as the user writes them: with '~' for the home directory."""

from __future__ import annotations

import os

from trainer.config.errors import UserError, shorten


def expand(path: str | os.PathLike[str], where: str) -> str:
    """Returns a path whose '~' is the home directory; no shell expands that in `--workdir=~/runs`.

    Args:
        path: of a file or directory.
        where: the flag or key, for messages.

    Raises:
        UserError: if there is no such home directory; never makes a directory of that name.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith('~'):
        name = shorten(text.partition('/')[0])
        raise UserError(
            f'{where}: {shorten(text)}: the home directory {name} is not known (HOME is not set, '
            f"or there is no such user); write the whole path, or './{name}' for a directory of "
            'that name'
        )
    return expanded


def cache_directory() -> str | None:
    """Returns the directory of the user's caches, None if there is no home directory."""
    expanded = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    return None if expanded.startswith('~') else expanded
