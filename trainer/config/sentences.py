# SPDX-License-Identifier: Apache-2.0
"""The description of each fixed config key, taken from the docstrings of the sections."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence

from trainer.config import schema

# The first line of an attribute in a docstring; its continuation lines are indented deeper, and so
# they have no word at this column.
_KEY = re.compile(r'    (\w+): (.*)')


@functools.cache
def key_sentences(section: type) -> Mapping[str, str]:
    """Returns the sentence of each key of a section, by key.

    The result is empty under `python -OO`, which removes docstrings.
    """
    _, _, attributes = inspect.cleandoc(section.__doc__ or '').partition('\n\nAttributes:\n')
    texts: dict[str, str] = {}
    key = ''
    for line in attributes.splitlines():
        if match := _KEY.fullmatch(line):
            key = match[1]
            texts[key] = match[2]
        else:
            texts[key] += f' {line.strip()}'
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


def summary(section: type) -> str:
    """Returns the part of a section's docstring above its keys, with one line per paragraph."""
    text, _, _ = inspect.cleandoc(section.__doc__ or '').partition('\n\nAttributes:\n')
    return '\n\n'.join(' '.join(part.split()) for part in text.split('\n\n'))


def sentence_at(keys: Sequence[str]) -> str:
    """Returns the sentence of a key path, '' if it is not a fixed key.

    The `target` or `ref` of an object has the sentence of the object.
    """
    section = schema.section_at(keys[:-1])
    sentence = key_sentences(section).get(keys[-1], '') if section is not None else ''
    # `config.model.target` is what a user sets to choose a model, and no section lists it.
    if not sentence and keys[-1] in ('target', 'ref') and len(keys) > 1:
        return sentence_at(keys[:-1])
    return sentence
