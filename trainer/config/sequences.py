# SPDX-License-Identifier: Apache-2.0
"""The number and types of elements that an annotation allows in a tuple or list."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

# The types of single values that a text on the command line may mean.
PLAIN = (int, float, str, bool)


@dataclasses.dataclass(frozen=True)
class Elements:
    """The elements that an annotation allows in a sequence.

    Attributes:
        hints: the type of each element; if their number is not fixed, the one type of all.
        fixed: whether there must be exactly as many elements as types.
    """

    hints: tuple[Any, ...]
    fixed: bool

    def hints_for(self, count: int) -> tuple[Any, ...]:
        """Returns the type of each of `count` elements."""
        return self.hints if self.fixed else self.hints * count


def elements(hint: Any) -> Elements | None:
    """Returns the elements of a sequence with an annotation, None if it allows no sequence.

    `Sequence[int]`, `list[int]`, `tuple[int, ...]` and `tuple` have any number of elements,
    `tuple[int, int]` has two. Of a union such as `tuple[int, int] | list[int]`, the option with any
    number of elements counts.
    """
    allowed = [each for each in map(_type_elements, options(hint)) if each is not None]
    # False sorts before True: not fixed comes first.
    return min(allowed, key=lambda each: each.fixed, default=None)


def are_alike(values: Sequence[Any]) -> bool:
    """Whether elements all have one type, at every depth, so that their number may change."""
    return len({_kind(value) for value in values}) <= 1


def have_same_lengths(one: Any, other: Any) -> bool:
    """Whether two sequences have the same number of elements, at every depth."""
    if not isinstance(one, (tuple, list)) or not isinstance(other, (tuple, list)):
        return not isinstance(one, (tuple, list)) and not isinstance(other, (tuple, list))
    return len(one) == len(other) and all(map(have_same_lengths, one, other))


def is_list(hint: Any) -> bool:
    """Whether an annotation allows a list."""
    return any((typing.get_origin(each) or each) is list for each in options(hint))


def is_union(hint: Any) -> bool:
    """Whether an annotation is a union, such as `int | str`."""
    # Python has two types of unions: `int | str` and `typing.Optional[int]`.
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def options(hint: Any) -> tuple[Any, ...]:
    """Returns the options of a union; any other annotation is its own only option."""
    return typing.get_args(hint) if is_union(hint) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether an annotation allows only numbers, text and None."""
    return all(each in (*PLAIN, types.NoneType) for each in options(hint))


def describe(hint: Any) -> str:
    """Returns an annotation as it is written: 'tuple[int, int]'."""
    return inspect.formatannotation(hint)


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Mapping
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_kind, value))
    return type(value)


def _type_elements(hint: Any) -> Elements | None:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if not isinstance(origin, type) or not issubclass(origin, collections.abc.Iterable):
        return None
    if issubclass(origin, (str, bytes, Mapping)):
        return None
    if not issubclass(origin, tuple):
        return Elements(args[:1] or (Any,), fixed=False)
    if hasattr(origin, '_fields'):  # A named tuple.
        return Elements((Any,) * len(origin._fields), fixed=True)
    # Neither `tuple` nor `tuple[()]`, the type of the empty tuple, has arguments.
    if not args and hint != tuple[()]:
        return Elements((Any,), fixed=False)
    if args and args[-1] is Ellipsis:
        return Elements(args[:1], fixed=False)
    return Elements(args, fixed=True)
