# SPDX-License-Identifier: Apache-2.0
"""The score that shows what a language model writes."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.scores import Samples

EXAMPLES = {
    'prompt': np.array([[104, 105, 0], [97, 98, 99]]),
    'prompt_length': np.array([2, 3]),
    'generated': np.array([[33, 0], [195, 100]]),
    'length': np.array([1, 2]),
}


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, tokens: np.ndarray) -> str:
        return ''.join('-' + chr(token) for token in tokens)


def test_texts_are_without_padding() -> None:
    """Half of a character is shown as such."""
    assert Samples()(EXAMPLES)['samples'].texts == ('hi▶!', 'abc▶\ufffdd')


def test_texts_of_a_tokenizer() -> None:
    assert Samples(tokenizer=Letters(), count=1)(EXAMPLES)['samples'].texts == ('-h-i▶-!',)


def test_a_token_that_is_no_byte_is_an_error() -> None:
    other = {**EXAMPLES, 'generated': np.array([[300, 0], [1, 2]])}
    with pytest.raises(UserError, match=r'Samples: 300 is no byte; give the score the tokenizer'):
        Samples()(other)


def test_other_predictions_are_an_error() -> None:
    with pytest.raises(UserError, match=r"Samples: no 'prompt' .*, next: .*:Continuation"):
        Samples()({'next': np.zeros((2, 3))})
