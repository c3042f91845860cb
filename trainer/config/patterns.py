# SPDX-License-Identifier: Apache-2.0
"""Regular expressions in a config, which must match whole key paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainer.config.errors import UserError
from trainer.config.text import and_more

_SHOWN = 5


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Returns the expression.

    Args:
        pattern: as the config has it.
        where: config path or flag, for the message.

    Raises:
        UserError: if it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f'{where}: {pattern!r} is not a regular expression: {error}') from error


def matches(patterns: Iterable[str], path: str) -> bool:
    """Returns whether one of the patterns matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def check_used(
    patterns: Iterable[str], paths: Sequence[str], where: str, nothing: str = 'no parameter'
) -> None:
    """Checks that each pattern matches one of the paths.

    Args:
        patterns: regular expressions.
        paths: all that there are.
        where: config path of the patterns, for the message.
        nothing: what a wrong pattern matches: 'no parameter'.

    Raises:
        UserError: for a pattern that is none, or matches none of the paths.
    """
    for pattern in patterns:
        expression = compile_pattern(pattern, where)
        if any(map(expression.fullmatch, paths)):
            continue
        if not paths:
            raise UserError(f'{where}: the pattern {pattern!r} matches {nothing}: there is none')
        raise UserError(
            f'{where}: the pattern {pattern!r} matches {nothing}. A pattern must match a whole '
            f'path, such as {and_more(paths, _SHOWN)}'
        )
