# SPDX-License-Identifier: Apache-2.0
"""Objects from dicts; arguments are checked against signatures before anything is called."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import pytest

from trainer.config import signatures, targets
from trainer.config.errors import UserError

HERE = __name__


def plain(a: int, b: int = 2) -> tuple[int, int]:
    return a, b


def anything(**kwargs: Any) -> dict[str, Any]:
    return kwargs


@functools.wraps(plain)
def wrapper(*args: Any, **kwargs: Any) -> Any:
    return plain(*args, **kwargs)


partial = functools.partial(plain, b=5)


class Picky:
    def __init__(self, value: int):
        if value < 0:
            raise ValueError(f'value {value} is negative')


def make(name: str, **node: Any) -> Any:
    return targets.instantiate({'target': f'{HERE}:{name}', **node}, 'config.x')


def test_objects_nest() -> None:
    inner = {'target': f'{HERE}:plain', 'a': 1}
    assert make('plain', a=inner, b=[inner, ({'ref': f'{HERE}:plain'},)]) == (
        (1, 2), [(1, 2), (plain,)],
    )  # fmt: skip
    assert make('plain', args=(7,)) == (7, 2)
    assert make('wrapper', a=3) == (3, 2)
    assert make('partial', a=3) == (3, 5)
    assert make('anything', c=1, accepts_any=True) == {'c': 1}


class Pair(NamedTuple):
    first: int
    second: int


def test_a_tuple_subclass_is_not_a_container() -> None:
    """Such as an optimizer; only plain tuples and lists are containers."""
    pair = Pair(1, 2)
    assert make('plain', a=pair, b=(pair,)) == (pair, (pair,))
    assert isinstance(make('plain', a=pair)[0], Pair)


def several(*parts: Any) -> tuple[Any, ...]:
    return parts


def nothing() -> None: ...


@pytest.mark.parametrize(
    ('name', 'node', 'message'),
    [
        ('several', {'a': 1}, r'It takes positional arguments only, .*, such as args\[0\]\.a\.'),
        (
            'several',
            {'a': 1, 'args': (2, {'a': 3})},
            r'positional arguments only, .* Did you mean config\.x\.args\[1\]\.a\?',
        ),
        ('nothing', {'a': 1}, r"takes no argument 'a'\. It takes none\."),
        ('plain', {'a': 1, 'bb': 2}, r"config\.x\.bb: .* takes no argument 'bb'"),
        ('wrapper', {'a': 1, 'c': 2}, r'config\.x\.c'),
        ('plain', {}, r'config\.x\.a is missing'),
        ('plain', {'a': 1, 'args': (2,)}, r'config\.x\.a is given twice'),
        ('anything', {'c': 1}, 'accepts_any=True'),
        ('Picky', {'value': -1}, r'config\.x: .*Picky refused its arguments: value -1 is negative'),
        (
            'Picky',
            {'value': '5'},
            r"is the text '5': write a number without quotation marks; a duration has a unit",
        ),
        (
            'Picky',
            {'value': '1e-3'},
            r"config\.x\.value is the text '1e-3': write a number without quot",
        ),
        ('Picky', {'value': {'a': 1}}, r"config\.x\.value is a dict without a 'target'"),
        ('plian', {'a': 1}, 'Did you mean .*:plain?'),
    ],
)
def test_invalid_arguments(name: str, node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, **node)


@pytest.mark.parametrize(
    ('node', 'message'),
    [
        ({'target': 'nowhere.at.all:X'}, "no module 'nowhere.at.all'"),
        ({'target': 'optax'}, "expected 'package.module:Name'"),
        ({'ref': 'optax:sgd', 'learning_rate': 1}, 'takes no other key'),
        ({'target': 'math:pi'}, 'is not callable'),
    ],
)
def test_invalid_names(node: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        targets.instantiate(node, 'config.x')


@functools.wraps(plain)
def partly_wrapped(*args: Any, extra: int = 0, **kwargs: Any) -> Any:
    return (*plain(*args, **kwargs), extra)


nested_partial = functools.partial(partial, b=6)
partial_of_open = functools.partial(anything, c=1)


@pytest.mark.parametrize('name', ['partial', 'wrapper', 'partly_wrapped', 'nested_partial'])
def test_signatures_of_wrapped_functions(name: str) -> None:
    parameters, open_ended = signatures.arguments(globals()[name])
    assert {'a', 'b'} <= set(parameters)
    assert not open_ended
    with pytest.raises(UserError, match=r"takes no argument 'bb'\. Did you mean config\.x\.b\?"):
        make(name, a=1, bb=2)


def test_wrappers_are_called_with_their_own_arguments_too() -> None:
    assert make('partly_wrapped', a=1, extra=3) == (1, 2, 3)
    assert make('nested_partial', a=1) == (1, 6)
    assert make('partial', a=1, b=9) == (1, 9)


def test_open_signatures() -> None:
    for name in ('anything', 'partial_of_open'):
        with pytest.raises(UserError, match=r'config\.x\.d: .* add config\.x\.accepts_any=True'):
            make(name, d=2)
        assert make(name, d=2, accepts_any=True)['d'] == 2
    assert make('anything') == {}


def test_accepts_any_needs_an_open_signature() -> None:
    with pytest.raises(UserError, match="takes no argument 'c'"):
        make('plain', a=1, c=2, accepts_any=True)


def test_check_calls_nothing() -> None:
    node = {'target': f'{HERE}:Picky', 'value': -1}
    targets.check(node, 'config.x')
    with pytest.raises(UserError, match=r'config\.x\.inner\[1\]: .*Picky refused'):
        targets.instantiate({'inner': [1, node]}, 'config.x')


def test_check_reaches_every_depth() -> None:
    node = {'target': f'{HERE}:plain', 'a': ({'k': [{'ref': 'math:pie'}]},)}
    with pytest.raises(UserError, match=r'config\.x\.a\[0\]\.k\[0\]\.ref: .*math:pi\?'):
        targets.check(node, 'config.x')


@pytest.mark.parametrize('args', [5, 'ab', None])
def test_args_must_be_a_tuple(args: object) -> None:
    with pytest.raises(UserError, match=r'config\.x\.args: expected a tuple'):
        make('plain', args=args)


def test_too_many_args() -> None:
    with pytest.raises(targets.RefusedArguments, match=r'config\.x: .*plain refused') as caught:
        make('plain', args=(1, 2, 3))
    assert re.fullmatch(r'config\.x: .*:plain', caught.value.who)


def test_arguments_that_the_framework_supplies() -> None:
    targets.check({'target': f'{HERE}:takes_rngs', 'size': 1}, 'config.x')
    with pytest.raises(UserError, match=r'config\.x\.size is missing'):
        targets.check({'target': f'{HERE}:takes_rngs'}, 'config.x')


def takes_rngs(size: int, *, rngs: Any, train: bool) -> None:
    del size, rngs, train


def test_a_user_error_of_a_constructor_is_not_wrapped() -> None:
    with pytest.raises(UserError, match=r'^a clear message$'):
        make('raises_user_error')


def raises_user_error() -> None:
    raise UserError('a clear message')


def test_notes_of_an_exception_are_kept() -> None:
    with pytest.raises(UserError, match='bad\nin the second layer'):
        make('raise_with_note')


def raise_with_note() -> None:
    error = ValueError('bad')
    error.add_note('in the second layer')
    raise error


def test_other_exceptions_of_a_constructor_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        make('divides')


def divides() -> float:
    return 1 / 0
