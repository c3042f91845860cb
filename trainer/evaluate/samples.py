# SPDX-License-Identifier: Apache-2.0
"""`Samples`: shows what a language model writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.evaluate.score import Examples
from trainer.observe.summaries import Texts

# Between a prompt and what was generated: unlikely to be in either.
MARK = '▶'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Shows prompts and their continuations as text.

    For predictions of `trainer.tasks:Continuation`. The result is `samples`: a text for each of the
    first examples, such as 'import ▶os', with a mark where the generated text begins.

    Attributes:
        tokenizer: has a method `decode(tokens)`, from int (n,) to text, such as that of
            `trainer.data.bpe:BPE`; None if the tokens are the bytes of texts in UTF-8.
        count: number of texts to show.
    """

    tokenizer: Any = None
    count: int = 8

    def __call__(self, examples: Examples) -> dict[str, Texts]:
        """Returns the texts.

        Raises:
            UserError: if a prediction is missing, or a token is no byte.
        """
        names = ('prompt', 'prompt_length', 'generated', 'length')
        if missing := [name for name in names if name not in examples]:
            raise UserError(
                f'Samples: no {missing[0]!r} among the predictions, {", ".join(examples)}: use the '
                'task trainer.tasks:Continuation'
            )
        rows = zip(*(examples[name][: self.count] for name in names), strict=True)
        return {
            'samples': Texts(
                [
                    self._decode(prompt[:given]) + MARK + self._decode(generated[:length])
                    for prompt, given, generated, length in rows
                ]
            )
        }

    def _decode(self, tokens: np.ndarray) -> str:
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(tokens))
        if ((tokens < 0) | (tokens > 255)).any():
            raise UserError(
                f'Samples: {tokens[(tokens < 0) | (tokens > 255)][0]} is no byte; give the score '
                'the tokenizer of the data'
            )
        return tokens.astype(np.uint8).tobytes().decode(errors='replace')
