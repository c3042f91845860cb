# SPDX-License-Identifier: Apache-2.0
"""The score of translations."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.scores import Translation, score_texts

needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec('sacrebleu') is None, reason='needs the package sacrebleu'
)


class Letters:
    """A vocabulary of letters."""

    def decode(self, tokens: Any) -> str:
        return ''.join(' abcde'[token] for token in tokens)


EXAMPLES: dict[str, Any] = {
    'tokens': np.array([[1, 2, 3], [4, 5, 1]]),
    'source_text': np.array(['one', 'two']),
    'target_text': np.array(['abc', 'dea ']),
}


def test_exact_matches_and_samples() -> None:
    values = Translation(vocabulary=Letters(), metrics=(), count=1)(EXAMPLES)
    assert values['exact_match'] == 1 / 2
    assert values['samples'].texts == ('source:      one\nreference:   abc\ntranslation: abc',)
    assert set(values) == {'exact_match', 'samples'}


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Translation(vocabulary=Letters(), metrics=())
    with pytest.raises(UserError, match=r"no 'target_text' among .*fields=\('source_text', "):
        score({name: x for name, x in EXAMPLES.items() if name != 'target_text'})
    with pytest.raises(UserError, match="expected some of bleu, chrf, in a tuple, got 'bleu'"):
        Translation(vocabulary=Letters(), metrics='bleu')
    monkeypatch.setitem(sys.modules, 'sacrebleu', None)
    with pytest.raises(UserError, match='pip install sacrebleu'):
        Translation(vocabulary=Letters())


@needs_sacrebleu
def test_metrics_and_their_signatures() -> None:
    right = ['the cat sat on the mat', 'it is raining today']
    values = score_texts(right, right)
    assert (values['bleu'], values['chrf']) == (pytest.approx(100), 100)
    [text] = values['signatures'].texts  # type: ignore[union-attr]
    bleu, chrf = text.splitlines()
    assert bleu.startswith('BLEU nrefs:1|case:mixed') and chrf.startswith('CHRF nrefs:1|')
    some = score_texts(['the cat sat on a mat', 'it is sunny today'], right, ('bleu',))
    assert 10 < some['bleu'] < 90 and 'CHRF' not in some['signatures'].texts[0]  # type: ignore


@needs_sacrebleu
def test_bleu_is_of_the_whole_set() -> None:
    """Not the mean over its texts: 3 of 4 words and 1 of 3 pairs, and so on, are right."""
    [found, right] = [['a b c d e', 'x y z v'], ['a b c d f', 'x y z v']]
    counts = [(8, 9), (6, 7), (4, 5), (2, 3)]
    expected = 100 * np.prod([a / b for a, b in counts]) ** (1 / 4)
    assert score_texts(found, right, ('bleu',))['bleu'] == pytest.approx(expected)
