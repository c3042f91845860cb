# SPDX-License-Identifier: Apache-2.0
"""Sums as text: correct, different in each epoch, and held out by both orders."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.addition import ALPHABET, Addition, Numbered, decode, encode
from trainer.data.rng import ExampleRng


def draw_sums(count: int, *, epoch: int = 0, **options: object) -> list[tuple[int, int, int]]:
    """Returns the two numbers and the answer of each sum."""
    ids = np.arange(count)
    rng = ExampleRng(0, 0, np.full(count, epoch), ids)
    batch = Addition(**options)({'index': ids}, rng)  # type: ignore[arg-type]
    assert {name: x.dtype for name, x in batch.items()} == dict.fromkeys(
        ('inputs', 'lengths', 'targets'), np.dtype('int32')
    )
    questions = decode(batch['inputs'])
    assert [len(text) for text in questions] == batch['lengths'].tolist()
    assert (batch['targets'][:, -1] == 0).all()  # The end of each answer is there.
    numbers = [tuple(map(int, text.split('+'))) for text in questions]
    answers = [int(text[::-1]) for text in decode(batch['targets'])]
    return [(a, b, answer) for (a, b), answer in zip(numbers, answers, strict=True)]


@pytest.mark.parametrize('digits', [1, 2, 3])
@pytest.mark.parametrize('held_out', [False, True])
def test_the_answers_are_right(digits: int, held_out: bool) -> None:
    sums = draw_sums(500, digits=digits, held_out=held_out)
    assert all(a + b == answer for a, b, answer in sums)
    assert max(max(a, b) for a, b, _ in sums) < 10**digits


def test_held_out_sums_are_never_trained_on() -> None:
    """Each of the hundred sums of single digits is in one split only, in both orders."""
    train = {(a, b) for a, b, _ in draw_sums(5000, digits=1)}
    test = {(a, b) for a, b, _ in draw_sums(500, digits=1, held_out=True)}
    assert not train & test
    assert (len(train), len(test)) == (90, 10)
    assert {(b, a) for a, b in test} == test


def test_another_epoch_has_other_sums() -> None:
    assert draw_sums(50) == draw_sums(50)
    assert len(set(draw_sums(50)) & set(draw_sums(50, epoch=1))) < 5


@pytest.mark.parametrize('digits', [0, 8])
def test_an_invalid_number_of_digits_is_refused(digits: int) -> None:
    with pytest.raises(ValueError, match=f'digits: expected 1 to 7, got {digits}'):
        Addition(digits=digits)


def test_the_source_of_indices() -> None:
    source = Numbered(7)
    assert len(source) == 7
    assert source.gather(np.array([3, 6]))['index'].tolist() == [3, 6]
    assert source.spec['index'].shape == ()


def test_texts_and_tokens() -> None:
    texts = ['1+2', '999+999', '']
    tokens = encode(np.array(texts), 7)
    assert tokens.shape == (3, 7)
    assert tokens[0].tolist() == [ALPHABET.index(c) for c in '1+2    ']
    assert decode(tokens) == texts
