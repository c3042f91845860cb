# SPDX-License-Identifier: Apache-2.0
"""Converts texts of the command line to the type of a config key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config import literals, schema, sequences
from trainer.config.durations import Duration, is_duration
from trainer.config.errors import UserError, short_repr

# The shell takes quotes away: --config.mesh={"data": 2} arrives as {data: 2}.
_UNREADABLE = (
    'The text is neither JSON nor a Python literal. Are quotes missing? In a shell a dict is '
    "written as in '{\"a\": 1}', a tuple as in '(1, 2)'."
)
_BOOLS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}
_NUMBERS = {'inf': math.inf, '+inf': math.inf, '-inf': -math.inf, 'nan': math.nan}

# Returns the annotation of the argument that a value is for, None if there is none. Finding it
# imports the target, so it is asked only where the value now does not say enough.
Annotation = Callable[[], Any]


def no_annotation() -> Any:
    """The annotation of what has none."""
    return None


def parse(
    text: str, old: Any, hint: Any, keys: Sequence[str | int], path: str,
    annotation: Annotation = no_annotation,
) -> Any:  # fmt: skip
    """Returns the value of a text of the command line for a key.

    Raises:
        UserError: as `convert`, and for what a config cannot hold.
    """
    value = literals.literal(text)
    literals.check_depth(value, path)
    if isinstance(value, float) and not isinstance(old, str) and not _wants_text(hint):
        literals.check_overflow(value, text, path)
    try:
        new = convert(value, text, old, hint, path, annotation)
    except UserError as error:
        if isinstance(value, str) and text.startswith(('{', '[', '(')):
            raise UserError(f'{error}\n{_UNREADABLE}') from error
        raise
    literals.check_overflow(new, text, path)
    literals.check(new, path, keys)
    return new


def convert(
    value: Any, text: str, old: Any, hint: Any, path: str, annotation: Annotation = no_annotation
) -> Any:
    """Returns a literal as a value of the type that a key has.

    Args:
        value: the literal.
        text: how it was written.
        old: the key's value now; None if it has none.
        hint: the key's type if it is a fixed key, else None.
        path: 'config.a.b', for messages.
        annotation: of the argument that the key is.

    Raises:
        UserError: if it is no value of that type.
    """
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
    if isinstance(value, (int, float)) and not isinstance(value, bool) and _wants_text(hint):
        value = text
    if schema.without_none(hint) is float:
        value = _to_number(value)
    if value is not None and schema.without_none(hint) is bool:
        return _to_bool(text, path)
    if isinstance(value, list):
        value = tuple(value)
    checked = schema.check(value, hint, path, {})
    return str(checked) if isinstance(checked, Duration) else checked


def _is_scalar(hint: Any) -> bool:
    return schema.without_none(hint) in (int, float, str, bool, Duration)


def _wants_text(hint: Any) -> bool:
    return hint is str or hint is Duration


def _to_number(value: Any) -> Any:
    """Returns the number for 'inf' and 'nan', which a dict has as texts; other values unchanged."""
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


def _convert_like(
    text: str, value: Any, old: Any, path: str, annotation: Annotation = no_annotation
) -> Any:
    """Returns a literal as a value of the type of `old`."""
    many = isinstance(value, (tuple, list)) and not isinstance(old, (tuple, list, Mapping, bool))
    if many and sequences.elements(annotation()) is not None:
        # `int | Sequence[int]`: a size for all, or one for each.
        return _convert_annotated(text, value, (), annotation(), path)
    if isinstance(old, bool):
        return _to_bool(text, path)
    if isinstance(old, Mapping):
        # A schedule may become a number; everything else that is an object stays one.
        if isinstance(value, (int, float)) or value is None:
            return value
        if set(old) == {'ref'} and isinstance(value, str) and value.isidentifier():
            # Another function of the same module: what is there says whether it has one.
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
    # Of free strings, 'never' is a word like any other.
    if is_duration(old) and old != 'never':
        in_optimizer = path.startswith('config.optimizer.')
        if isinstance(value, int) and in_optimizer:
            return value
        return str(Duration.parse(text, path, zero=in_optimizer))
    # Quotes are the shell's affair, but '"a"' means a.
    return value if isinstance(value, str) else text


def _convert_number(text: str, value: Any, old: Any, path: str) -> Any:
    if isinstance(old, float):
        value = _to_number(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return schema.to_float(value, path)
    if isinstance(old, int) and is_number and isinstance(value, int):
        return value
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
    """Says how to choose another object, or to change an argument of the present one."""
    kind = next((key for key in ('target', 'ref') if key in old), None)
    if kind is None:
        return ''
    return f'. It is {old[kind]} now; to choose another, set --{path}.{kind}=package.module:Name'


def _convert_sequence(text: str, value: Any, old: Any, path: str, annotation: Annotation) -> Any:
    """Returns a literal as a sequence like `old`; how long it may be, the annotation says."""
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
    wanted = sequences.elements(hint)
    if wanted is not None:
        return _convert_annotated(text, value, old, hint, path)
    if not isinstance(old, list) and not sequences.are_alike(old) and len(value) != len(old):
        raise UserError(
            f'{path}: expected {len(old)} elements, as in {short_repr(old)}, got {len(value)}: '
            f'{short_repr(text)}'
        )
    return _convert_each(value, [old[:1]] * len(value), path, type(old))


def _convert_annotated(text: str, value: Any, old: Any, hint: Any, path: str) -> Any:
    """Returns a literal as the sequence that an annotation describes."""
    wanted = sequences.elements(hint)
    assert wanted is not None
    if wanted.fixed and len(value) != len(wanted.hints):
        count = len(wanted.hints)
        raise UserError(
            f'{path}: expected {count} element{"s" if count != 1 else ""} '
            f'({sequences.describe(hint)}), got {len(value)}: {short_repr(text)}'
        )
    kind = list if isinstance(old, list) or sequences.is_list(hint) else tuple
    # Of a fixed number of elements, each has a type of its own: that of the others says nothing.
    apart = wanted.fixed and len(old) == len(wanted.hints)
    return kind(
        _convert_element(x, inner, old[i : i + 1] if apart else old, f'{path}[{i}]')
        for i, (x, inner) in enumerate(zip(value, wanted.of(len(value)), strict=True))
    )


def _convert_element(value: Any, hint: Any, others: Sequence[Any], path: str) -> Any:
    """Returns an element as its annotation wants it, or like one of the elements until now."""
    if isinstance(value, (tuple, list)) and sequences.elements(hint) is not None:
        like = next((x for x in others if isinstance(x, (tuple, list))), ())
        return _convert_annotated(literals.to_text(value), value, like, hint, path)
    if is_duration(value) and path.startswith('config.optimizer.'):
        return value
    # Where the file has durations or objects instead of numbers, they say what is right.
    if sequences.is_plain(hint) and all(_is_allowed(x, hint) for x in others):
        return schema.check(value, hint, path, {})
    if hint is Any or (sequences.is_union(hint) and _is_allowed(value, hint)):
        return schema.check(value, hint, path, {})
    return _convert_like_one_of(value, others, path)


def _is_allowed(value: Any, hint: Any) -> bool:
    """Whether a value has a type that an annotation (`int | Sequence[int]`) allows."""
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
    """Returns an element as a value of the type of the first of `likes` that it fits."""
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
