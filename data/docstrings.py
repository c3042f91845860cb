# SPDX-License-Identifier: Apache-2.0
"""A small text classification task that every installation of Python has: whose docstring is it?"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from .sources import ArraySource

# Packages of the standard library with enough documented functions, in every Python from 3.11 on.
PACKAGES = (
    'asyncio', 'email', 'http', 'importlib', 'logging', 'multiprocessing', 'unittest', 'xml',
)  # fmt: skip

# Shorter ones say too little of where they stand.
_LEAST_CHARACTERS = 30


class Docstrings(ArraySource):
    """The docstrings of packages of Python's standard library, and the number of the package.

    No text is in both splits, or twice in one; which split it is in depends on the text alone.

    Fields: `tokens` int32 (length,), word pieces padded with 0, and `label` int32 ().
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        packages: Sequence[str] = PACKAGES,
        length: int = 64,
        split: str = 'train',
        holdout: float = 0.25,
        limit: int | None = None,
    ):
        """Reads the source code and cuts its docstrings into word pieces.

        Args:
            tokenizer: a `tokenizer.json` of Hugging Face, or the directory that it is in.
            packages: names of packages; their order is that of the labels.
            length: tokens of a row; what is longer is cut off.
            split: 'train' or 'test'.
            holdout: fraction of the texts that is the test split.
            limit: use only this many texts of the split.

        Raises:
            ValueError: if there is no such tokenizer or package.
        """
        if split not in ('train', 'test'):
            raise ValueError(f'split: {split!r} is none of train, test')
        texts: dict[str, int] = {}
        for label, package in enumerate(packages):
            for text in _docstrings(package):
                texts.setdefault(text, label)
        # In an order that says nothing of the package: any limit leaves some of each.
        ordered = sorted(texts, key=_fraction)
        chosen = [text for text in ordered if (_fraction(text) < holdout) == (split == 'test')]
        tokens = encode(chosen, tokenizer, length)
        labels = np.array([texts[text] for text in chosen], np.int32)
        super().__init__({'tokens': tokens, 'label': labels}, limit=limit)


def encode(texts: Sequence[str], tokenizer: str, length: int) -> np.ndarray:
    """Returns the tokens of texts by the `tokenizers` library, int32 (texts, length).

    Args:
        texts: of any length.
        tokenizer: a `tokenizer.json` of Hugging Face, or the directory that it is in.
        length: of each row; padded with 0, cut off behind.

    Raises:
        ValueError: if there is no such file, or the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError(
            'texts are cut into word pieces by the package tokenizers: pip install tokenizers'
        ) from error
    path = os.path.expanduser(tokenizer)
    path = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise ValueError(
            f'tokenizer: there is no file {path}, relative to {os.getcwd()}; expected a '
            'tokenizer.json of Hugging Face, or the directory that it is in'
        )
    pieces = Tokenizer.from_file(path)
    pieces.enable_truncation(length)
    pieces.enable_padding(length=length)
    return np.array([one.ids for one in pieces.encode_batch(list(texts))], np.int32)


def _docstrings(package: str) -> Iterator[str]:
    root = os.path.join(sysconfig.get_path('stdlib'), package)
    if not os.path.isdir(root):
        raise ValueError(f'packages: the standard library has no package {package!r} in {root}')
    for directory, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in ('test', 'tests', '__pycache__'))
        for name in sorted(name for name in names if name.endswith('.py')):
            with open(os.path.join(directory, name), encoding='utf-8') as file:
                tree = _parsed(file.read())
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or '')
                    if len(text) >= _LEAST_CHARACTERS:
                        yield text


def _parsed(text: str) -> ast.Module:
    # Python 3.11 counts the depth of all conversions to trees in one place. What the collector of
    # garbage calls amid one may begin another, and the first ends in a SystemError.
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collects:
            gc.enable()


def _fraction(text: str) -> float:
    """Returns a number in [0, 1) that is the same for the same text everywhere."""
    return zlib.crc32(text.encode()) / 2**32
