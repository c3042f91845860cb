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

    - `exact_match`: the share of sentences in which all tags are right
    - `sentences`: a text for each of the first sentences, such as 'Ali/NOUN geldi/VERB'; a wrong
      tag is followed by the right one, such as 'mi/NOUN(PRT)'
    - `confused`: the most frequent mistakes, if there are any.

    Words without a label do not count.

    Attributes:
        tags: names of the tags, in the order of their numbers.
        label: field with the tags, int (examples, length), negative for none. Name it in the
            `fields` of the score, too.
        show: number of sentences, and of mistakes, to show.
    """

    tags: Sequence[str]
    label: str = 'tag'
    show: int = 10

    def __call__(self, examples: Examples) -> dict[str, float | Texts]:
        """Returns the share, and both texts.

        Raises:
            UserError: if a prediction or the label is missing, or the model has more tags.
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
        is_wrong = (guesses != labels) & (labels >= 0) & is_real
        highest = max(guesses[is_real].max(), labels[is_real].max())
        if highest >= len(self.tags):
            raise UserError(
                f'TaggedText: the tag {highest} has no name; `tags` names {len(self.tags)}: '
                f'{", ".join(self.tags)}'
            )
        pairs = zip(labels[is_wrong].tolist(), guesses[is_wrong].tolist(), strict=True)
        mistakes = collections.Counter(pairs).most_common(self.show)
        confused = [f'{self.tags[a]} taken for {self.tags[b]}: {n}' for (a, b), n in mistakes]
        shown = [
            ' '.join(map(self._format, text.split('\t'), row, right, wrong))
            for text, row, right, wrong in zip(
                examples['text'][: self.show].tolist(), guesses, labels, is_wrong, strict=False
            )
        ]
        # Without a mistake, an empty text would be written.
        lists = {'confused': Texts('\n'.join(confused))} if confused else {}
        share = float(1 - is_wrong.any(1).mean())
        return {'exact_match': share, 'sentences': Texts(shown), **lists}

    def _format(self, word: str, guess: int, label: int, is_wrong: bool) -> str:
        right = f'({self.tags[label]})' if is_wrong else ''
        return f'{word}/{self.tags[guess]}{right}'
