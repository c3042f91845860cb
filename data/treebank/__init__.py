# SPDX-License-Identifier: Apache-2.0
"""The Turkish Web Treebank, read from the two files in this directory."""

from __future__ import annotations

import functools
import pathlib

from .. import conllu

_DIRECTORY = pathlib.Path(__file__).parent

# Of the unpacked files.
_SHA256 = {
    'web.conllu.gz': 'd6f92b12b74f367a36e30dd3d644d7a0bb01a991584602e6e69f1191664f86bf',
    'wiki.conllu.gz': '58f049fae8d0653ba0940a58168c17c7cebbc50f88cad2985d12d34ac1b9acde',
}


@functools.cache
def read() -> tuple[tuple[conllu.Sentence, ...], ...]:
    """Returns the sentences of the sections web (2,541) and wiki (2,310), with 14 tags.

    Raises:
        ValueError: if a file is damaged.
    """
    return tuple(
        tuple(conllu.read(_DIRECTORY / name, sha256=sha256)) for name, sha256 in _SHA256.items()
    )
