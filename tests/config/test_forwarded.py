# SPDX-License-Identifier: Apache-2.0
"""The names that `**kwargs` may contain are found by reading where they are passed on to."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest

from trainer.config import signatures, targets
from trainer.config.errors import UserError

HERE = __name__


class Net:
    def __init__(self, width: int, depth: int = 2, act: Callable[..., Any] = max):
        self.arguments = (width, depth, act)


class Wide(Net):
    def __init__(self, scale: float = 1.0, **kwargs: Any):
        super().__init__(8, **kwargs)
        self.scale = scale


class Wider(Wide):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


class Mixed(Wider, collections.UserDict[str, Any]):
    """Of two bases: which constructor is next cannot be known from one of them alone."""


class Settings:
    def __init__(self, width: int, **kwargs: Any):
        self.width, self.rest = width, kwargs

    @classmethod
    def small(cls, **kwargs: Any) -> Settings:
        return cls(2, **kwargs)


class Sized(Settings):
    def __init__(self, height: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        self.height = height


def variant(name: str | None = None, **kw: Any) -> Any:
    defaults = {} if name is None else {'width': {'S': 4}[name]}
    return Net(**{**defaults, **kw})


def with_defaults(name: str | None = None, **kw: Any) -> Any:
    for key, value in {'width': 4, 'depth': 3}.items():
        kw.setdefault(key, value)
    logging.info('settings: %s', kw)
    logging.debug(f'settings: {kw}')
    return functools.partial(Net)(**kw) if name == 'partial' else Net(**kw)


def one_of(kind: str = 'net', **kw: Any) -> Any:
    flat = kw.pop('flat', False)
    return (Net(**kw), flat) if kind == 'net' else Wide(**kw)


def outer(**kw: Any) -> Any:
    return variant(**kw)


def looked_up(kind: str = 'net', **kw: Any) -> Any:
    return {'net': Net}[kind](**kw)


def filter_keywords(**kw: Any) -> Any:
    kw = {key: value for key, value in kw.items() if key != 'flat'}
    return Net(**kw)


def endless(**kw: Any) -> Any:
    return endless(**kw)


def shadow(**kw: Any) -> Any:
    def inner(**kw: Any) -> Any:
        return kw

    return inner(**kw)


def enclosing() -> Callable[..., Any]:
    class Inner:
        def __init__(self, size: int):
            self.size = size

    def make(**kw: Any) -> Inner:
        return Inner(**kw)

    return make


enclosed = enclosing()


@pytest.mark.parametrize(
    ('name', 'names'),
    [
        ('variant', {'name', 'width', 'depth', 'act'}),
        ('outer', {'name', 'width', 'depth', 'act'}),
        ('Wide', {'scale', 'depth', 'act'}),
        ('Wider', {'scale', 'depth', 'act'}),
        ('one_of', {'kind', 'flat', 'width', 'scale', 'depth', 'act'}),
        ('enclosed', {'size'}),
    ],
)
def test_names_are_those_of_the_callees(name: str, names: set[str]) -> None:
    parameters, open_ended = signatures.arguments(globals()[name])
    assert parameters.keys() == names
    assert not open_ended


@pytest.mark.parametrize(
    ('name', 'names'),
    [
        ('Sized', {'height', 'width'}),
        ('Mixed', set()),
        ('with_defaults', {'name', 'width', 'depth', 'act'}),
        ('looked_up', {'kind'}),
        ('filter_keywords', {'width', 'depth', 'act'}),
        ('endless', set()),
        ('shadow', set()),
    ],
)
def test_where_a_use_is_not_understood_other_names_may_be_valid(name: str, names: set[str]) -> None:
    parameters, open_ended = signatures.arguments(globals()[name])
    assert parameters.keys() == names
    assert open_ended
    with pytest.raises(UserError, match=r'config\.x\.d: .* add config\.x\.accepts_any=True'):
        targets.check({'target': f'{HERE}:{name}', 'd': 1}, 'config.x')


def test_a_class_method_passes_them_to_its_class() -> None:
    parameters, open_ended = signatures.arguments(Sized.small)
    assert parameters.keys() == {'width'}  # The first argument is `height`.
    assert open_ended


def test_no_forwarded_name_is_required() -> None:
    node = {'target': f'{HERE}:variant', 'name': 'S', 'depth': 5}
    assert targets.instantiate(node, 'config.x').arguments == (4, 5, max)


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"takes no argument 'dept'\. Did you mean config.x.depth"):
        targets.check({'target': f'{HERE}:variant', 'dept': 5}, 'config.x')
    with pytest.raises(UserError, match="takes no argument 'width'"):
        targets.check({'target': f'{HERE}:Wide', 'width': 5}, 'config.x')


def test_source_that_cannot_be_read_keeps_the_names_open() -> None:
    namespace: dict[str, Any] = {'Net': Net}
    exec('def made(**kw): return Net(**kw)', namespace)
    assert signatures.arguments(namespace['made']) == ({}, True)
