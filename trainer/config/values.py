# SPDX-License-Identifier: Apache-2.0
"""Converts the text of an override to the type of its config key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config import literals, schema, sequences
from trainer.config.durations import Duration, is_duration
from trainer.config.errors import UserError, short_repr

# The shell removes quotation marks: --config.mesh={"data": 2} arrives as {data: 2}.
_QUOTING_HINT = (
    'The text is neither JSON nor a Python literal. Are quotation marks missing? In a shell, write '
    "a dict as '{\"a\": 1}' and a tuple as '(1, 2)'."
)
_BOOLS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}
_NUMBERS = {'inf': math.inf, '+inf': math.inf, '-inf': -math.inf, 'nan': math.nan}

# Returns the annotation of the argument that a value is for, None if there is none. A function,
# because the target must be imported for it: it is called only where the old value does not
# determine the type.
Annotation = Callable[[], Any]


def no_annotation() -> Any:
    """Returns the annotation of a value that has none."""
    return None


def parse(
    text: str, old: Any, hint: Any, keys: Sequence[str | int], path: str,
    annotation: Annotation = no_annotation,
) -> Any:  # fmt: skip
    """Returns the value of an override.

    Args:
        text: what the override sets: the text after '='.
        old: value of the key until now; None if it has none.
        hint: type of the key; None if it has none, as arguments of targets.
        keys: key path, as names and indices.
        path: the same as 'config.a.b', for messages.
        annotation: returns the annotation of the argument that the key is.

    Raises:
        UserError: for a value of another type, or one that a config cannot contain.
    """
    value = literals.literal(text)
    literals.check_depth(value, path)
    # Before the conversion, which would say "expected int" for 1e400; but '1e400' may be a name.
    if isinstance(value, float) and not isinstance(old, str) and not _wants_text(hint):
        literals.check_overflow(value, text, path)
    try:
        new = convert(value, text, old, hint, path, annotation)
    except UserError as error:
        # Such a text was meant to be a dict or a tuple.
        if isinstance(value, str) and text.startswith(('{', '[', '(')):
            raise UserError(f'{error}\n{_QUOTING_HINT}') from error
        raise
    # Numbers within tuples and dicts have not been checked yet.
    literals.check_overflow(new, text, path)
    literals.check(new, path, keys)
    return new


def convert(
    value: Any, text: str, old: Any, hint: Any, path: str, annotation: Annotation = no_annotation
) -> Any:
    """Returns a literal as a value of the type of a key.

    The type is that of `hint`; without one, that of the old value; and without either, the
    annotation decides about sequences, and any other value is accepted.

    Args:
        value: the Python literal that the text has been parsed to.
        text: the text that was given.
        old: value of the key until now; None if it has none.
        hint: type of the key; None if it has none, as arguments of targets.
        path: 'config.a.b', for messages.
        annotation: returns the annotation of the argument that the key is.

    Raises:
        UserError: if the literal does not have that type.
    """
    # A dict for a section is not converted here: it is merged with the old one, key by key.
    if hint is not None and (not isinstance(value, Mapping) or _is_scalar(hint)):
        return _convert_to_hint(text, value, hint, path)
    if old is None or old is schema.REQUIRED:
        if isinstance(value, (tuple, list)) and sequences.elements(annotation()) is not None:
            return _convert_annotated(text, value, (), annotation(), path)
        return value
    if isinstance(value, Mapping):
        if isinstance(old, Mapping) or _names_object(value):
            return value
        raise UserError(
            f'{path}: expected {type(old).__name__}, as {short_repr(old)} is, or a dict that '
            f"names an object (with 'target' or 'ref'); got {short_repr(text)}"
        )
    return _convert_like(text, value, old, path, annotation)


def _names_object(value: Mapping[Any, Any]) -> bool:
    return 'target' in value or 'ref' in value


def _convert_to_hint(text: str, value: Any, hint: Any, path: str) -> Any:
    # A name may look like a number: `init_from.path=2024`.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _wants_text(hint):
        value = text
    if schema.without_none(hint) is float:
        value = _to_number(value)
    if value is not None and schema.without_none(hint) is bool:
        return _to_bool(text, path)
    if isinstance(value, list):
        value = tuple(value)
    checked = schema.check(value, hint, path, {})
    # A config contains durations as text; `schema.read` parses them.
    return str(checked) if isinstance(checked, Duration) else checked


def _is_scalar(hint: Any) -> bool:
    return schema.without_none(hint) in (int, float, str, bool, Duration)


def _wants_text(hint: Any) -> bool:
    return hint is str or hint is Duration


def _to_number(value: Any) -> Any:
    """Returns the number for the texts 'inf' and 'nan', and any other value unchanged."""
    # In a dict they may be texts, because JSON has no such numbers.
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


def _convert_like(
    text: str, value: Any, old: Any, path: str, annotation: Annotation = no_annotation
) -> Any:
    """Returns a literal as a value of the type of `old`."""
    is_new_sequence = isinstance(value, (tuple, list)) and not isinstance(
        old, (tuple, list, Mapping, bool)
    )
    # An argument `int | Sequence[int]` may change from one size for all to a size for each.
    if is_new_sequence and sequences.elements(annotation()) is not None:
        return _convert_annotated(text, value, (), annotation(), path)
    if isinstance(old, bool):
        return _to_bool(text, path)
    if isinstance(old, Mapping):
        # A number may replace a schedule; other objects must remain objects.
        if isinstance(value, (int, float)) or value is None:
            return value
        if set(old) == {'ref'} and isinstance(value, str) and value.isidentifier():
            # Another function of the same module; whether it exists is checked later.
            return {'ref': f'{old["ref"].partition(":")[0]}:{value}'}
        if set(old) == {'ref'} and isinstance(value, str) and ':' in value:
            return {'ref': value}
        raise UserError(
            f'{path}: expected a dict or a number, got {short_repr(text)}{_object_hint(old, path)}'
        )
    if isinstance(old, str):
        return _convert_text(text, value, old, path)
    if isinstance(old, (tuple, list)):
        return _convert_sequence(text, value, old, path, annotation)
    return _convert_number(text, value, old, path)


def _to_bool(text: str, path: str) -> bool:
    if text.lower() not in _BOOLS:
        raise UserError(f'{path}: expected true or false, got {short_repr(text)}')
    return _BOOLS[text.lower()]


def _convert_text(text: str, value: Any, old: str, path: str) -> Any:
    # An argument that is 'never' may be any text, not a duration.
    if is_duration(old) and old != 'never':
        # Durations in the optimizer become numbers of steps, so a number may replace one.
        in_optimizer = path.startswith('config.optimizer.')
        if isinstance(value, int) and in_optimizer:
            return value
        return str(Duration.parse(text, path, zero=in_optimizer))
    # '"a"' is a literal and means a; '3' is the text of a number.
    return value if isinstance(value, str) else text


def _convert_number(text: str, value: Any, old: Any, path: str) -> Any:
    if isinstance(old, float):
        value = _to_number(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return schema.to_float(value, path)
    if isinstance(old, int) and is_number and isinstance(value, int):
        return value
    # The opposite of `_convert_text`: a duration may replace a number of steps.
    if isinstance(old, int) and is_duration(text) and path.startswith('config.optimizer.'):
        return text
    hint = ''
    if path.endswith('learning_rate') and isinstance(value, str):
        hint = (
            '. A schedule is an object, as in \'{"target": "optax:cosine_decay_schedule", '
            '"init_value": 0.1, "decay_steps": "100%"}\''
        )
    raise UserError(f'{path}: expected {type(old).__name__}, got {short_repr(text)}{hint}')


def _object_hint(old: Mapping[str, Any], path: str) -> str:
    """Returns a hint on how to choose another object."""
    key = next((key for key in ('target', 'ref') if key in old), None)
    if key is None:
        return ''
    return f'. It is {old[key]} now; to choose another, set --{path}.{key}=package.module:Name'


def _convert_sequence(text: str, value: Any, old: Any, path: str, annotation: Annotation) -> Any:
    """Returns a literal as a sequence like `old`, of any length that the annotation allows."""
    # Of the same length, each element has the type of the old one at its index. The annotation is
    # needed (and the target imported) only if one does not fit.
    if sequences.have_same_lengths(value, old):
        try:
            return _convert_each(value, [(x,) for x in old], path, type(old))
        except UserError:
            if sequences.elements(annotation()) is None:
                raise
    hint = annotation()
    if not isinstance(value, (tuple, list)):
        if _is_allowed(value, hint):
            return value
        kind = type(old).__name__
        raise UserError(f'{path}: expected a {kind} like {short_repr(old)}, got {short_repr(text)}')
    if sequences.elements(hint) is not None:
        return _convert_annotated(text, value, old, hint, path)
    # Without an annotation, a tuple such as (0.9, 'a') probably has a meaning for each index.
    if not isinstance(old, list) and not sequences.are_alike(old) and len(value) != len(old):
        raise UserError(
            f'{path}: expected {len(old)} elements, as in {short_repr(old)}, got {len(value)}: '
            f'{short_repr(text)}'
        )
    return _convert_each(value, [old[:1]] * len(value), path, type(old))


def _convert_annotated(text: str, value: Any, old: Any, hint: Any, path: str) -> Any:
    """Returns a literal as a sequence that its annotation allows."""
    elements = sequences.elements(hint)
    assert elements is not None
    if elements.fixed and len(value) != len(elements.hints):
        count = len(elements.hints)
        raise UserError(
            f'{path}: expected {count} element{"s" if count != 1 else ""} '
            f'({sequences.describe(hint)}), got {len(value)}: {short_repr(text)}'
        )
    kind = list if isinstance(old, list) or sequences.is_list(hint) else tuple
    # If the number is fixed, an element is compared with the old one at its index; otherwise all
    # have one type, and any of the old ones shows it.
    by_index = elements.fixed and len(old) == len(elements.hints)
    return kind(
        _convert_element(x, inner, old[i : i + 1] if by_index else old, f'{path}[{i}]')
        for i, (x, inner) in enumerate(zip(value, elements.hints_for(len(value)), strict=True))
    )


def _convert_element(value: Any, hint: Any, others: Sequence[Any], path: str) -> Any:
    """Returns an element with the type of its annotation, or else that of one of the old elements.

    Args:
        value: one element of the sequence.
        hint: the annotation of the element.
        others: the old elements that it may be like.
        path: its path, for messages.
    """
    if isinstance(value, (tuple, list)) and sequences.elements(hint) is not None:
        like = next((x for x in others if isinstance(x, (tuple, list))), ())
        return _convert_annotated(literals.to_text(value), value, like, hint, path)
    if is_duration(value) and path.startswith('config.optimizer.'):
        return value
    # Only if the old elements fit the annotation: the file may have durations or objects in place
    # of numbers.
    if sequences.is_plain(hint) and all(_is_allowed(x, hint) for x in others):
        return schema.check(value, hint, path, {})
    if hint is Any or (sequences.is_union(hint) and _is_allowed(value, hint)):
        return schema.check(value, hint, path, {})
    return _convert_like_one_of(value, others, path)


def _is_allowed(value: Any, hint: Any) -> bool:
    """Whether a value has one of the types of an annotation, such as `int | Sequence[int]`."""
    try:
        schema.check(value, hint, '', {})
    except UserError:
        return False
    return hint is not None and hint is not Any


def _convert_each(
    value: Sequence[Any], likes: Sequence[Sequence[Any]], path: str, kind: type[Any]
) -> Any:
    pairs = zip(value, likes, strict=True)
    return kind(_convert_like_one_of(x, like, f'{path}[{i}]') for i, (x, like) in enumerate(pairs))


def _convert_like_one_of(value: Any, likes: Sequence[Any], path: str) -> Any:
    """Returns an element with the type of the first value of `likes` that it can be converted to.

    Raises:
        UserError: the error about the last of `likes`, if it fits none.
    """
    for index, like in enumerate(likes):
        if isinstance(value, Mapping) and (isinstance(like, Mapping) or _names_object(value)):
            return value
        try:
            if isinstance(like, str) and not isinstance(value, (str, int, float)):
                raise UserError(
                    f'{path}: expected str, as {short_repr(like)} is, got {short_repr(value)}'
                )
            return _convert_like(literals.to_text(value), value, like, path)
        except UserError:
            if index == len(likes) - 1:
                raise
    return value
