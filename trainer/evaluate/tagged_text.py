# SPDX-License-Identifier: Apache-2.0
"""`TaggedText`: shows sentences with the tags of their words, and the tags that are confused."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.score import Examples
from trainer.observe.summaries import Texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggedText:
    """Shows the tags of words in sentences of different lengths.

    For predictions of `trainer.tasks:Classification` with `keep=('text', 'length')`, on the batches
    of `trainer.data.sequences:PaddedSequences`. The results are

    - `exact_match`: the share of sentences in which all tags are right, of those with a label; NaN
      if there are none
    - `sentences`: a text for each of the first sentences, such as 'Ali/NOUN geldi/VERB'; a wrong
      tag is followed by the right one, such as 'mi/NOUN(PRT)'
    - `confused`: the most frequent mistakes, if there are any.

    Words without a label do not count. A tag without a name is shown as its number.

    Attributes:
        tags: names of the tags, in the order of their numbers.
        label: field with the tags, int (examples, length), negative for none. Name it in the
            `fields` of the score, too.
        count: how many sentences, and how many mistakes, are shown.
    """

    tags: Sequence[str]
    label: str = 'tag'
    count: int = 10

    def __call__(self, examples: Examples) -> dict[str, float | Texts]:
        """Returns the share, and both texts.

        Raises:
            UserError: if a prediction or the label is missing.
        """
        needed = ('class', 'length', 'text', self.label)
        if missing := [name for name in needed if name not in examples]:
            raise UserError(
                f'TaggedText: no {missing[0]!r} among the predictions, {", ".join(examples)}: use '
                f"the task trainer.tasks:Classification with keep=('text', 'length'), and the "
                f'score with fields=({self.label!r},)'
            )
        guesses, labels = examples['class'], examples[self.label]
        is_real = np.arange(labels.shape[1]) < examples['length'][:, None]
        is_counted = (labels >= 0) & is_real
        is_wrong = (guesses != labels) & is_counted
        pairs = zip(labels[is_wrong].tolist(), guesses[is_wrong].tolist(), strict=True)
        mistakes = collections.Counter(pairs).most_common(self.count)
        confused = [f'{self._name(a)} taken for {self._name(b)}: {n}' for (a, b), n in mistakes]
        shown = [
            ' '.join(map(self._format, text.split('\t'), row, right, wrong))
            for text, row, right, wrong in zip(
                examples['text'][: self.count].tolist(), guesses, labels, is_wrong, strict=False
            )
        ]
        # Without a mistake, an empty text would be written.
        lists = {'confused': Texts('\n'.join(confused))} if confused else {}
        failed = is_wrong.any(1)[is_counted.any(1)]
        share = float(1 - failed.mean()) if failed.size else float('nan')
        return {'exact_match': share, 'sentences': Texts(shown), **lists}

    def _format(self, word: str, guess: int, label: int, is_wrong: bool) -> str:
        right = f'({self._name(label)})' if is_wrong else ''
        return f'{word}/{self._name(guess)}{right}'

    def _name(self, tag: int) -> str:
        # Not an error: the model may have more outputs than there are tags.
        return self.tags[tag] if tag < len(self.tags) else str(tag)
