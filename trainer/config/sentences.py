# SPDX-License-Identifier: Apache-2.0
"""What each fixed key of a config is for: the sentences in the docstrings of the sections."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence

from trainer.config import schema

_KEY = re.compile(r'    (\w+): (.*)')


@functools.cache
def key_sentences(section: type) -> Mapping[str, str]:
    """Returns the sentence of each key of a section; none if Python has removed docstrings."""
    _, _, attributes = inspect.cleandoc(section.__doc__ or '').partition('\n\nAttributes:\n')
    found: dict[str, str] = {}
    key = ''
    for line in attributes.splitlines():
        if match := _KEY.fullmatch(line):
            key = match[1]
            found[key] = match[2]
        else:
            found[key] += f' {line.strip()}'
    return {name: text[0].upper() + text[1:] for name, text in found.items()}


def summary(section: type) -> str:
    """Returns what the docstring of a section says before its keys, on one line a paragraph."""
    text, _, _ = inspect.cleandoc(section.__doc__ or '').partition('\n\nAttributes:\n')
    return '\n\n'.join(' '.join(part.split()) for part in text.split('\n\n'))


def sentence_at(keys: Sequence[str]) -> str:
    """Returns the sentence of a key path, '' if it is not a fixed key.

    That of an object is also that of its `target`, or its `ref`.
    """
    section = schema.section_at(keys[:-1])
    found = key_sentences(section).get(keys[-1], '') if section is not None else ''
    if not found and keys[-1] in ('target', 'ref') and len(keys) > 1:
        return sentence_at(keys[:-1])
    return found
