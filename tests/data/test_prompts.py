# SPDX-License-Identifier: Apache-2.0
"""Prompts that are given as texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from trainer.data.prompts import Prompts


class Letters:
    """A tokenizer that numbers the letters."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([ord(letter) - 96 for letter in text], np.int32) for text in texts]


def test_texts_become_padded_bytes() -> None:
    found = Prompts(('hi', 'ä!')).gather(np.array([1, 0]))
    assert found['tokens'].tolist() == [[195, 164, 33], [104, 105, 0]]
    assert found['length'].tolist() == [3, 2]
    assert {x.dtype for x in found.values()} == {np.dtype('int32')}


def test_tokens_of_a_tokenizer_after_a_first_one() -> None:
    source = Prompts(['', 'ab'], Letters(), start=7)
    assert source.gather(np.arange(2))['tokens'].tolist() == [[7, 0, 0], [7, 1, 2]]
    assert len(Prompts('ab')) == 1


@pytest.mark.parametrize('texts', [(), ('a', '')])
def test_a_prompt_without_a_token_is_an_error(texts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match='texts: expected at least one, and a token in each'):
        Prompts(texts)
