# SPDX-License-Identifier: Apache-2.0
"""`Translation`: BLEU and chrF of translations, and some of them as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trainer.config.errors import UserError
from trainer.evaluate.score import Examples
from trainer.observe.summaries import Texts

# Attributes of `sacrebleu` that score a whole set of translations.
_METRICS = {'bleu': 'BLEU', 'chrf': 'CHRF'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation:
    """Compares translations with those of the data.

    For predictions of `trainer.tasks:SequenceToSequence`. The results are

    - `bleu` and `chrf`, from 0 to 100, by the library sacrebleu: of text without tokens, so they
      can be compared with those of other vocabularies, and with published ones
    - `signatures`: a text that says how both were computed, to be published with them
    - `exact_match`: the share of translations that are equal to those of the data
    - `samples`: a text for each of the first examples: source, reference and translation.

    Attributes:
        vocabulary: object whose method `decode` returns the text of tokens (length,), such as
            `data.bpe.BPE`.
        metrics: which to compute, 'bleu' and 'chrf'; both need the package sacrebleu.
        source: field with the sources, text. Name it in the `fields` of the score, too.
        reference: field with the translations of the data, text; also among the `fields`.
        count: how many samples are shown.
    """

    vocabulary: Any
    metrics: Sequence[str] = tuple(_METRICS)
    source: str = 'source_text'
    reference: str = 'target_text'
    count: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str) or set(self.metrics) - set(_METRICS):
            raise UserError(f'Translation: metrics: expected some of {", ".join(_METRICS)}, in a '
                            f'tuple, got {self.metrics!r}')  # fmt: skip
        if self.metrics:
            _import_sacrebleu()  # Now, and not at the first evaluation, an epoch later.

    def __call__(self, examples: Examples) -> dict[str, float | Texts]:
        """Returns the numbers and both texts.

        Raises:
            UserError: if a prediction or a field is missing.
        """
        needed = ('tokens', self.source, self.reference)
        if missing := [name for name in needed if name not in examples]:
            raise UserError(
                f'Translation: no {missing[0]!r} among the predictions, {", ".join(examples)}: use '
                'the task trainer.tasks:SequenceToSequence, and the score with '
                f'fields={(self.source, self.reference)!r}'
            )
        found = [self.vocabulary.decode(tokens) for tokens in examples['tokens']]
        sources, references = (examples[name].tolist() for name in needed[1:])
        exact = sum(a == b for a, b in zip(found, references, strict=True)) / len(found)
        shown = zip(sources, references, found, strict=True)
        samples = [
            f'source:      {source}\nreference:   {reference}\ntranslation: {translation}'
            for source, reference, translation in list(shown)[: self.count]
        ]
        return {
            **score_texts(found, references, self.metrics),
            'exact_match': exact,
            'samples': Texts(samples),
        }


def score_texts(
    translations: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = ('bleu', 'chrf'),
) -> dict[str, float | Texts]:
    """Returns metrics of translations by name, from 0 to 100, and `signatures`.

    Args:
        translations: the texts.
        references: a correct translation of each.
        metrics: 'bleu' (Papineni et al., 2002), 'chrf' (Popović, 2015), or both.

    Raises:
        UserError: if the package sacrebleu is not installed.
    """
    if not metrics:
        return {}
    sacrebleu = _import_sacrebleu()
    scores: dict[str, float | Texts] = {}
    signatures = []
    for name in metrics:
        metric = getattr(sacrebleu, _METRICS[name])()
        scores[name] = float(metric.corpus_score(list(translations), [list(references)]).score)
        signatures.append(f'{_METRICS[name]} {metric.get_signature()}')
    return {**scores, 'signatures': Texts('\n'.join(signatures))}


def _import_sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError(
            'Translation: BLEU and chrF need a package that is not installed: pip install sacrebleu'
        ) from error
    return sacrebleu
