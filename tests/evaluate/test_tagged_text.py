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
SCORE = TaggedText(tags=('DET', 'ADJ', 'NOUN'), show=3)


def test_sentences_and_mistakes() -> None:
    """Padding does not count, nor does a word without a label."""
    values = SCORE(EXAMPLES)
    assert values['exact_match'] == pytest.approx(2 / 3)
    assert values['sentences'].texts == (
        'der/DET Hut/NOUN', 'oh/ADJ', 'rot/NOUN(ADJ) ist/ADJ der/NOUN(DET)',
    )  # fmt: skip
    [confused] = values['confused'].texts
    assert confused.splitlines() == ['ADJ taken for NOUN: 1', 'DET taken for NOUN: 1']


def test_the_number_shown() -> None:
    values = TaggedText(tags=SCORE.tags, show=1)(EXAMPLES)
    assert len(values['sentences'].texts) == 1
    assert values['confused'].texts == ('ADJ taken for NOUN: 1',)


def test_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"no 'length' among .*keep=\('text', 'length'\)"):
        SCORE({name: x for name, x in EXAMPLES.items() if name != 'length'})
    with pytest.raises(UserError, match=r'the tag 2 has no name; `tags` names 2: DET, ADJ'):
        TaggedText(tags=('DET', 'ADJ'))(EXAMPLES)
