# SPDX-License-Identifier: Apache-2.0
"""The number and types of elements of a tuple or list, from the annotation of an argument."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

# The types of single values that a text of the command line can be.
PLAIN = (int, float, str, bool)


@dataclasses.dataclass(frozen=True)
class Elements:
    """The elements of a sequence.

    Attributes:
        hints: the type of each; a single one, of all of them, if there may be any number.
        fixed: whether there must be exactly as many.
    """

    hints: tuple[Any, ...]
    fixed: bool

    def of(self, count: int) -> tuple[Any, ...]:
        """Returns the types of so many elements."""
        return self.hints if self.fixed else self.hints * count


def elements(hint: Any) -> Elements | None:
    """Returns what an annotation says of the elements; None if it names no kind of sequence.

    `Sequence[int]`, `list[int]`, `tuple[int, ...]` and `tuple` have any number of elements,
    `tuple[int, int]` has two. Of a union, a sequence of any length counts first.
    """
    found = [each for each in map(_type_elements, options(hint)) if each is not None]
    return min(found, key=lambda each: each.fixed, default=None)


def are_alike(values: Sequence[Any]) -> bool:
    """Whether elements are of one kind, so that there may be more or fewer of them."""
    return len({_kind(value) for value in values}) <= 1


def have_same_lengths(one: Any, other: Any) -> bool:
    """Whether two sequences have as many elements, at every depth."""
    if not isinstance(one, (tuple, list)) or not isinstance(other, (tuple, list)):
        return not isinstance(one, (tuple, list)) and not isinstance(other, (tuple, list))
    return len(one) == len(other) and all(map(have_same_lengths, one, other))


def is_list(hint: Any) -> bool:
    """Whether an annotation asks for a list."""
    return any((typing.get_origin(each) or each) is list for each in options(hint))


def is_union(hint: Any) -> bool:
    """Whether an annotation allows several types, as `int | str` does."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def options(hint: Any) -> tuple[Any, ...]:
    """Returns the types that an annotation allows: those of a union, or the one that it is."""
    return typing.get_args(hint) if is_union(hint) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether an annotation allows numbers, text and None only."""
    return all(each in (*PLAIN, types.NoneType) for each in options(hint))


def describe(hint: Any) -> str:
    """Returns an annotation as its user reads it: 'tuple[int, int]'."""
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
    if not args and hint != tuple[()]:
        return Elements((Any,), fixed=False)
    if args and args[-1] is Ellipsis:
        return Elements(args[:1], fixed=False)
    return Elements(args, fixed=True)
