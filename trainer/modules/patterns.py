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
    patterns: Iterable[str],
    paths: Sequence[str],
    where: str,
    nothing: str = 'no parameter',
    *,
    each: bool = True,
) -> None:
    """Checks that patterns match some of the paths.

    Args:
        patterns: regular expressions.
        paths: every path that a pattern could match.
        where: config path of the patterns, for the message.
        nothing: object of the message 'the pattern ... matches', such as 'no parameter'.
        each: whether each pattern must match a path, and not only one of them.

    Raises:
        UserError: for an invalid pattern, and for patterns that match none of the paths.
    """
    expressions = [compile_pattern(pattern, where) for pattern in patterns]
    unused = [e.pattern for e in expressions if not any(map(e.fullmatch, paths))]
    if each and unused:
        raise no_match_error(where, unused[:1], paths, nothing)
    if unused and len(unused) == len(expressions):
        raise no_match_error(where, unused, paths, nothing)


def no_match_error(
    where: str,
    patterns: Sequence[str],
    paths: Sequence[str],
    nothing: str = 'no parameter',
    *,
    is_whole: bool = True,
) -> UserError:
    """Returns the error for patterns that match none of the paths.

    Args:
        where: config path of the patterns.
        patterns: one or several.
        paths: every path that they could match.
        nothing: object of the message 'the pattern ... matches', such as 'no parameter'.
        is_whole: whether a pattern must match a whole path.
    """
    listed = ', '.join(map(repr, patterns))
    subject = f'the pattern {listed} matches' if len(patterns) == 1 else f'{listed} match'
    if not paths:
        return UserError(f'{where}: {subject} {nothing}: there is none')
    # A pattern that would match with `re.search` is the usual mistake.
    hint = 'A pattern must match a whole path, such as' if is_whole else 'The paths are'
    return UserError(f'{where}: {subject} {nothing}. {hint} {and_more(paths, _MAX_PATHS)}')
