# SPDX-License-Identifier: Apache-2.0
"""Advice on values that a config cannot contain, and that following it works."""

from __future__ import annotations

import ast
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.config import advice, literals, loading, targets
from trainer.config.errors import UserError

HERE = __name__


class Color(enum.Enum):
    RED = 1
    BOTH = (1, 2)


class Pair(NamedTuple):
    first: int
    second: int


def make_function() -> Any:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (
            lambda x: x,
            "give it a name: define it as a function in a module, and write dict(ref='pack",
        ),
        (
            (lambda: lambda x: x)(),
            "give it a name: define it as a function in a module, and write dict(ref='pack",
        ),
        (pathlib.Path('/a/b'), "write it as text: '/a/b'"),
        (Color.RED, f"write its value, 1, or its name, 'RED', or .*ref='{HERE}:Color.RED'"),
        (Color.BOTH, "write its name, 'BOTH', or name the member"),
        (np.ones(2), 'write a tuple or a list: [1.0, 1.0]'),
        (jnp.ones(2), 'write a tuple or a list: [1.0, 1.0]'),
        (np.ones(100), "name a function that returns it: dict(target='package.module:make')"),
        (np.float32(0.5), 'write a plain number: 0.5'),
        (np.int64(3), 'write a plain number: 3'),
        (np.bool_(True), 'write a plain number: True'),
        (jnp.int32(4), 'write a plain number: 4'),
        (fractions.Fraction(1, 2), 'write a plain number: 0.5'),
        (decimal.Decimal('0.5'), 'write a plain number: 0.5'),
        (jax.random.key(0), 'write a seed, a plain integer'),
        (jnp.bfloat16, "write the name of the dtype: 'bfloat16'"),
        (np.float32, "write the name of the dtype: 'float32'"),
        (np.dtype('int8'), "write the name of the dtype: 'int8'"),
        (
            optax.adam(0.1),
            "describe the call that returns it: dict(target='optax:adam', learning_rate",
        ),
        (optax.adam, "name it: dict(ref='optax:adam'), or, .*dict(target='optax:adam', ...)"),
        (
            optax.constant_schedule(1.0),
            "call that returns it: dict(target='optax:constant_schedule', .",
        ),
        (
            nn.initializers.lecun_normal(),
            "dict(target='jax.nn.initializers:variance_scaling', ...)",
        ),
        (nn.relu, "name it: dict(ref='jax.nn:relu')"),
        (nn.Dense, "name it: dict(ref='flax.linen:Dense')"),
        (nn.Dense(3), "describe the call that makes it: dict(target='flax.linen:Dense', ...)"),
        (Pair(1, 2), f"dict(target='{HERE}:Pair', ...) with first, second"),
        (
            make_function(),
            f"describe the call that returns it: dict(target='{HERE}:make_function', ...)",
        ),
        (
            'a'.upper,
            "write a function that calls it, in a module of yours, and name that: dict(ref='pack",
        ),
        ({2, 1}, 'write a tuple, whose order is fixed: (1, 2)'),
        (frozenset('ab'), "whose order is fixed: ('a', 'b')"),
        (b'abc', "write text: 'abc'"),
        (datetime.date(2026, 1, 2), "write text: '2026-01-02'"),
        (re.compile('a.*'), "write the pattern as text: 'a.*'"),
        (np, "name an object of the module: dict(ref='numpy:name')"),
        (
            iter('ab'),
            "write a tuple, or name the function that returns it: dict(target='package.mo",
        ),
        (object(), "describe the call that makes it: dict(target='builtins:object', ...)"),
    ],
)
def test_advice_for_a_value(value: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        literals.check(loading.to_plain({'a': (1, {'b': value})}), 'config', [])
    text = str(error.value)
    assert re.fullmatch(r'config\.a\[1\]\.b: expected a number, text, [^;]*, got .*; .*', text)
    assert re.search(re.escape(expected).replace(r'\.\*', '.*'), text), text
    assert 'pathlib:' not in text and '\n' not in text and len(text) < 500


def test_advice_for_the_name_of_a_target() -> None:
    for key, value, name in (
        ('target', nn.Dense, 'flax.linen:Dense'),
        ('ref', nn.relu, 'jax.nn:relu'),
    ):
        with pytest.raises(UserError, match=rf"config\.a\.{key}: .*; write its name: '{name}'"):
            literals.check({'a': {key: value}}, 'config', [])


@pytest.mark.parametrize(
    'value', [Color.RED, slice(0, 3), range(1, 9, 2), 1 + 2j, nn.relu, optax.adam]
)
def test_following_the_advice_gives_the_same_object(value: Any) -> None:
    assert follow_advice(value) == value


def test_following_the_advice_for_a_partial() -> None:
    made = follow_advice(functools.partial(nn.Dense, 3, use_bias=False))
    assert isinstance(made, functools.partial)
    assert (made.func, made.args, made.keywords) == (nn.Dense, (3,), {'use_bias': False})


def follow_advice(value: Any) -> Any:
    """Returns the object that the first dict in the advice for a value describes."""
    text = advice.advice(value)
    text = text[text.index('dict(') :]
    ends = (end for end in range(1, len(text) + 1) if is_call(text[:end]))
    return targets.instantiate(eval(text[: next(ends)]), 'config.x')


def is_call(text: str) -> bool:
    try:
        return isinstance(ast.parse(text, mode='eval').body, ast.Call)
    except SyntaxError:
        return False


def test_advice_for_functions_defined_in_the_config_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / 'own.py'
    path.write_text(
        'import enum, ml_collections\n'
        'class Kind(enum.Enum):\n    A = (1,)\n'
        'def double(x):\n    return 2 * x\n'
        'def get_config(arg):\n'
        '    return ml_collections.ConfigDict({"a": {"kind": Kind.A, "double": double}[arg]})\n'
    )
    with pytest.raises(UserError, match=r'not in the config file, and write dict\(ref=.*:double'):
        loading.load(f'{path}:double')
    with pytest.raises(UserError, match=r"its name, 'A', .*dict\(ref='package\.module:Kind\.A'\)"):
        loading.load(f'{path}:kind')
