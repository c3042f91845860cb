# SPDX-License-Identifier: Apache-2.0
"""Scores of a whole split, for `config.evals.NAME.score`."""

from trainer.evaluate.binary_report import BinaryReport
from trainer.evaluate.linear_probe import LinearProbe
from trainer.evaluate.samples import Samples
from trainer.evaluate.tagged_text import TaggedText
from trainer.evaluate.translation import Translation, score_texts

__all__ = ['BinaryReport', 'LinearProbe', 'Samples', 'TaggedText', 'Translation', 'score_texts']
