# SPDX-License-Identifier: Apache-2.0
"""The score that shows tagged sentences."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.scores import TaggedText

EXAMPLES = {
    'text': np.array(['der\tHut', 'oh', 'rot\tist\tder']),
    'length': np.array([2, 1, 3]),
    'class': np.array([[0, 2, 0], [1, 9, 9], [2, 1, 2]]),
    'tag': np.array([[0, 2, -1], [-1, -1, -1], [1, 1, 0]]),
}
SCORE = TaggedText(tags=('DET', 'ADJ', 'NOUN'), count=3)


def test_sentences_and_mistakes() -> None:
    """Padding does not count, nor does a word or a sentence without a label."""
    values = SCORE(EXAMPLES)
    assert values['exact_match'] == 1 / 2
    assert values['sentences'].texts == (
        'der/DET Hut/NOUN', 'oh/ADJ', 'rot/NOUN(ADJ) ist/ADJ der/NOUN(DET)',
    )  # fmt: skip
    [confused] = values['confused'].texts
    assert confused.splitlines() == ['ADJ taken for NOUN: 1', 'DET taken for NOUN: 1']


def test_the_number_shown() -> None:
    values = TaggedText(tags=SCORE.tags, count=1)(EXAMPLES)
    assert len(values['sentences'].texts) == 1
    assert values['confused'].texts == ('ADJ taken for NOUN: 1',)


def test_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"no 'length' among .*keep=\('text', 'length'\)"):
        SCORE({name: x for name, x in EXAMPLES.items() if name != 'length'})


def test_a_tag_without_a_name_is_shown_as_its_number() -> None:
    values = TaggedText(tags=('DET', 'ADJ'))(EXAMPLES)
    assert values['sentences'].texts[0] == 'der/DET Hut/2'
    assert values['confused'].texts == ('ADJ taken for 2: 1\nDET taken for 2: 1',)


def test_no_sentence_has_a_label() -> None:
    values = SCORE({**EXAMPLES, 'tag': np.full((3, 3), -1)})
    assert np.isnan(values['exact_match']) and 'confused' not in values
    assert values['sentences'].texts[2] == 'rot/NOUN ist/ADJ der/NOUN'
