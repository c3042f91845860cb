# SPDX-License-Identifier: Apache-2.0
"""A small language pair that is known exactly: numbers in English and in German words.

German has the ones before the tens and writes the words together: 'twenty-one thousand' is
'einundzwanzigtausend'. A one is 'eins' at the end of a number and 'ein' within.
"""

from __future__ import annotations

import numpy as np

from .translation import TextPairs

# From 0 to 19.
ENGLISH = (
    'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven',
    'twelve', 'thirteen', 'fourteen', 'fifteen', 'sixteen', 'seventeen', 'eighteen', 'nineteen',
)  # fmt: skip
GERMAN = (
    'null', 'eins', 'zwei', 'drei', 'vier', 'fünf', 'sechs', 'sieben', 'acht', 'neun', 'zehn',
    'elf', 'zwölf', 'dreizehn', 'vierzehn', 'fünfzehn', 'sechzehn', 'siebzehn', 'achtzehn',
    'neunzehn',
)  # fmt: skip
# From 20 to 90.
ENGLISH_TENS = (
    'twenty', 'thirty', 'forty', 'fifty', 'sixty', 'seventy', 'eighty', 'ninety',
)  # fmt: skip
GERMAN_TENS = (
    'zwanzig', 'dreißig', 'vierzig', 'fünfzig', 'sechzig', 'siebzig', 'achtzig', 'neunzig',
)  # fmt: skip

_NUMBERS = 100_000


class NumberWords(TextPairs):
    """Numbers below 100,000 in English words, and in German ones as their translation.

    Each number is in one split, by chance: one of ten in 'test', all others in 'train'.
    """

    def __init__(self, split: str, *, count: int):
        """Chooses the numbers; a split with a larger count begins with the same ones.

        Args:
            split: 'train' or 'test'.
            count: how many numbers, at most 90,000 for training and 10,000 for the test.

        Raises:
            ValueError: if the split is unknown, or the count is out of range.
        """
        if split not in ('train', 'test'):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        numbers = np.random.default_rng(0).permutation(_NUMBERS)
        tenth = _NUMBERS // 10
        numbers = numbers[:tenth] if split == 'test' else numbers[tenth:]
        if not 1 <= count <= len(numbers):
            raise ValueError(f'count: {count}; expected a number from 1 to {len(numbers)}')
        chosen = numbers[:count].tolist()
        super().__init__([to_english(n) for n in chosen], [to_german(n) for n in chosen])


def to_english(number: int) -> str:
    """Returns the words of a number from 0 to 999,999, such as 'one hundred and two'."""
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return ENGLISH_TENS[tens - 2] + (f'-{ENGLISH[ones]}' if ones else '')
    unit, name = (1000, 'thousand') if number >= 1000 else (100, 'hundred')
    many, rest = divmod(number, unit)
    # 'one thousand and two', but 'one thousand two hundred'.
    link = ' and ' if 0 < rest < 100 else ' '
    return f'{to_english(many)} {name}' + (link + to_english(rest) if rest else '')


def to_german(number: int) -> str:
    """Returns the word of a number from 0 to 999,999, such as 'einhundertzwei'."""
    if number < 20:
        return GERMAN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f'{_inflect(ones)}und' if ones else '') + GERMAN_TENS[tens - 2]
    unit, name = (1000, 'tausend') if number >= 1000 else (100, 'hundert')
    many, rest = divmod(number, unit)
    return f'{_inflect(many)}{name}' + (to_german(rest) if rest else '')


def _inflect(number: int) -> str:
    """Returns the word before another one: 'ein' for 'eins', 'einhundertein' for 101."""
    word = to_german(number)
    return word.removesuffix('s') if number % 100 == 1 else word
