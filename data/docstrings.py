# SPDX-License-Identifier: Apache-2.0
"""A text classification dataset that needs no download: which package is a docstring from?"""

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
from .words import load_tokenizer

# Packages of the standard library with enough documented functions, in every Python from 3.11 on.
PACKAGES = (
    'asyncio', 'email', 'http', 'importlib', 'logging', 'multiprocessing', 'unittest', 'xml',
)  # fmt: skip

# Shorter docstrings say too little about their package.
_MIN_CHARACTERS = 30


class Docstrings(ArraySource):
    """Docstrings from packages of Python's standard library, labeled with the package index.

    Duplicate texts are removed. The split of a text depends on the text alone, so none is in both.

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
        """Reads the source code and tokenizes its docstrings into word pieces.

        Args:
            tokenizer: a Hugging Face `tokenizer.json`, or the directory that contains it.
            packages: names of packages; the label of a text is the index of its package.
            length: tokens per example; longer texts are truncated.
            split: 'train' or 'test'.
            holdout: fraction of the texts in the test split.
            limit: use only this many texts of the split.

        Raises:
            ValueError: if there is no such tokenizer or package.
        """
        if split not in ('train', 'test'):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        texts: dict[str, int] = {}
        for label, package in enumerate(packages):
            for text in _docstrings(package):
                # A text of several packages is labeled with the first of them.
                texts.setdefault(text, label)
        # Sorted by hash, which is independent of the package: any `limit` keeps some texts of each.
        sorted_texts = sorted(texts, key=_fraction)
        in_split = [
            text for text in sorted_texts if (_fraction(text) < holdout) == (split == 'test')
        ]
        tokens = encode(in_split, tokenizer, length)
        labels = np.array([texts[text] for text in in_split], np.int32)
        super().__init__({'tokens': tokens, 'label': labels}, limit=limit)


def encode(texts: Sequence[str], tokenizer: str, length: int) -> np.ndarray:
    """Returns the tokens of texts by the `tokenizers` library, int32 (texts, length).

    Args:
        texts: of any length.
        tokenizer: a Hugging Face `tokenizer.json`, or the directory that contains it.
        length: tokens per text: longer texts are truncated, shorter ones padded with 0.

    Raises:
        ValueError: if there is no such file, or the library is not installed.
    """
    pieces = load_tokenizer(tokenizer)
    pieces.enable_truncation(length)
    pieces.enable_padding(length=length)
    return np.array([one.ids for one in pieces.encode_batch(list(texts))], np.int32)


def _docstrings(package: str) -> Iterator[str]:
    root = os.path.join(sysconfig.get_path('stdlib'), package)
    if not os.path.isdir(root):
        raise ValueError(f'packages: the standard library has no package {package!r} in {root}')
    for directory, subdirectories, names in os.walk(root):
        # In place, as `os.walk` asks for; sorted, because the order of a directory depends on the
        # file system.
        subdirectories[:] = sorted(
            name for name in subdirectories if name not in ('test', 'tests', '__pycache__')
        )
        for name in sorted(name for name in names if name.endswith('.py')):
            with open(os.path.join(directory, name), encoding='utf-8') as file:
                tree = _parse(file.read())
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or '')
                    if len(text) >= _MIN_CHARACTERS:
                        yield text


def _parse(text: str) -> ast.Module:
    # Python 3.11 has one recursion counter for all conversions to an AST. If garbage collection
    # runs code that starts another conversion in the middle of this one, this one fails with
    # SystemError.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_enabled:
            gc.enable()


def _fraction(text: str) -> float:
    """Returns a hash of the text in [0, 1), the same on every machine."""
    return zlib.crc32(text.encode()) / 2**32
