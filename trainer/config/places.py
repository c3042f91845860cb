# SPDX-License-Identifier: Apache-2.0
"""Expands '~' in paths to files that a user writes, and locates the user's cache directory."""

from __future__ import annotations

import os

from trainer.config.errors import UserError, shorten


def expand(path: str | os.PathLike[str], where: str) -> str:
    """Returns a path with a leading '~' replaced by the home directory.

    The shell does not expand it in `--workdir=~/runs`, where it does not begin a word.

    Args:
        path: path of a file or directory.
        where: the flag or key, for messages.

    Raises:
        UserError: if the home directory is unknown.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    # `expanduser` leaves an unknown '~' as it is: a run would create a directory called '~'.
    if expanded.startswith('~'):
        name = shorten(text.partition('/')[0])
        raise UserError(
            f'{where}: {shorten(text)}: unknown home directory {name} (HOME is not set, or there '
            f"is no such user); write the absolute path, or './{name}' for a directory of that name"
        )
    return expanded


def cache_directory() -> str | None:
    """Returns the user's cache directory, None if there is no home directory."""
    expanded = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    return None if expanded.startswith('~') else expanded
