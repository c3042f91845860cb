# SPDX-License-Identifier: Apache-2.0
"""Patterns of paths: regular expressions that must match the whole path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainer.config.errors import UserError, and_more

_MAX_PATHS = 5


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Returns the compiled pattern.

    Args:
        pattern: the text of the pattern.
        where: config path or flag, for the message.

    Raises:
        UserError: if the text is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f'{where}: {pattern!r} is not a regular expression: {error}') from error


def matches(patterns: Iterable[str], path: str) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def check_used(
    patterns: Iterable[str], paths: Sequence[str], where: str, nothing: str = 'no parameter'
) -> None:
    """Checks that each pattern matches one of the paths.

    Args:
        patterns: regular expressions.
        paths: every path that a pattern could match.
        where: config path of the patterns, for the message.
        nothing: object of the message 'the pattern ... matches', such as 'no parameter'.

    Raises:
        UserError: for an invalid pattern, or one that matches none of the paths.
    """
    for pattern in patterns:
        expression = compile_pattern(pattern, where)
        if any(map(expression.fullmatch, paths)):
            continue
        if not paths:
            raise UserError(f'{where}: the pattern {pattern!r} matches {nothing}: there is none')
        # A pattern that would match with `re.search` is the usual mistake.
        raise UserError(
            f'{where}: the pattern {pattern!r} matches {nothing}. A pattern must match a whole '
            f'path, such as {and_more(paths, _MAX_PATHS)}'
        )
