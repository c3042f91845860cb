# SPDX-License-Identifier: Apache-2.0
"""Texts of messages: one line for any value, and the notes of an error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config import errors
from trainer.config.errors import UserError


def test_a_value_is_on_one_line() -> None:
    text = errors.short_repr(np.arange(4).reshape(2, 2))
    assert text == 'array([[0, 1], [2, 3]])'


def test_the_middle_of_a_long_text_is_left_out() -> None:
    assert errors.shorten('a' * 100) == 'a' * 100
    text = errors.shorten('a' * 600 + 'b' * 600, limit=60)
    assert text == 'a' * 40 + '...' + 'b' * 10 + ' (1,200 characters)'


def test_values_whose_repr_fails_are_named_by_their_type() -> None:
    assert errors.short_repr(10**5000) == 'a very long int'

    class Endless:
        def __repr__(self) -> str:
            return f'{self}'

    assert errors.short_repr(Endless()) == 'a very long Endless'


def test_long_lists_count_the_remaining_items() -> None:
    assert errors.and_more(['a', 'b'], 2) == 'a, b'
    assert errors.and_more(['a', 'b', 'c', 'd'], 2, '; ') == 'a; b and 2 more'
    assert errors.indented_list(iter('abc'), 3) == '  a\n  b\n  c'
    assert errors.indented_list('abcde', 3) == '  a\n  b\n  c\n  and 2 more'
    assert errors.indented_list([]) == ''


def test_notes_follow_the_text_and_each_line_is_shortened() -> None:
    error = UserError('first')
    error.add_note('second')
    error.add_note('x' * 10_000)
    first, second, third = errors.full_text(error).split('\n')
    assert (first, second) == ('first', 'second')
    assert third.startswith('xxx') and third.endswith('(10,000 characters)')
    assert len(third) < 2000


def test_the_note_about_frames_that_jax_hides_is_left_out() -> None:
    @jax.jit
    def fail(x: jax.Array) -> jax.Array:
        raise ValueError('text')

    with pytest.raises(ValueError, match='text') as caught:
        fail(jnp.ones(()))
    caught.value.add_note('kept')
    assert errors.error_notes(caught.value) == ['kept']
    assert errors.full_text(caught.value) == 'text\nkept'


def test_a_mistake_of_the_user_ends_with_its_own_exit_code() -> None:
    assert UserError.exit_code == 2
