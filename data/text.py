# SPDX-License-Identifier: Apache-2.0
"""Text for language models: byte tokens in sequences, documents, and texts to be tokenized."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from typing import Any

import numpy as np

from .sources import Arrays, ArraySource, ArraySpec

# Parts of the standard library that are not typical Python code, or not always installed.
_EXCLUDED = (
    '__pycache__', 'distutils', 'encodings', 'ensurepip', 'idlelib', 'lib2to3', 'pydoc_data',
    'test', 'tests', 'tkinter', 'turtledemo', 'venv',
)  # fmt: skip


class Bytes(ArraySource):
    """The bytes of text files as tokens 0..255, in sequences that do not overlap.

    The files are concatenated in the order of their names. The end of the text is the test split,
    the rest the train split; the last, incomplete sequence of a split is dropped.

    Fields: `inputs` int32 (seq_len,), and `targets` int32 (seq_len,), the byte after each of them.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        seq_len: int,
        *,
        split: str = 'train',
        holdout: float = 0.05,
        limit: int | None = None,
    ):
        """Reads the files.

        Args:
            path: a file, a pattern such as 'books/**/*.txt', or several of these.
            seq_len: tokens per sequence.
            split: 'train' or 'test'.
            holdout: fraction of the text in the test split.
            limit: use only this many sequences from the start of the split.

        Raises:
            ValueError: if there is no such file, the split is shorter than a sequence, or an
                argument is out of range.
        """
        _check_split(split, holdout)
        if seq_len < 1:
            raise ValueError(f'seq_len: {seq_len} tokens; expected a positive number')
        files = [file for pattern in _as_list(path) for file in _list_files(pattern)]
        text = np.concatenate([np.frombuffer(_read_file(file), np.uint8) for file in files])
        # The end and not random sequences: those would be surrounded by text that was trained on.
        boundary = len(text) - round(holdout * len(text))
        tokens = text[:boundary] if split == 'train' else text[boundary:]
        used = (len(tokens) - 1) // seq_len * seq_len
        if used < 1:
            raise ValueError(
                f'split {split!r} has {len(tokens):,} of {len(text):,} bytes, but a sequence '
                f'and its last target need {seq_len + 1}. Use more text, a shorter seq_len or '
                'another holdout'
            )
        # Both fields are views of the same bytes: 8 times less memory than two int32 arrays.
        super().__init__(
            {
                'inputs': tokens[:used].reshape(-1, seq_len),
                'targets': tokens[1 : used + 1].reshape(-1, seq_len),
            },
            limit=limit,
        )

    @property
    def spec(self) -> dict[str, ArraySpec]:
        """Shape and dtype of each field of one example."""
        return {name: ArraySpec(s.shape, np.dtype(np.int32)) for name, s in super().spec.items()}

    def gather(self, indices: np.ndarray) -> Arrays:
        """Returns the sequences at `indices` (n,), each field as int32 (n, seq_len)."""
        # Converted per batch, and not in memory: token ids are int32 for models.
        return {name: x.astype(np.int32) for name, x in super().gather(indices).items()}


class Documents:
    """Text files as documents of different lengths, read on demand.

    The last files, in the order of their names, are the test split. The stages of a stream pack or
    split documents into sequences: see `trainer.data.stages`.

    Field: `tokens` int32 (n,): bytes, 0..255, or the tokens of the tokenizer, with the one that
    ends a text.

    Attributes:
        vocabulary: a checksum of the vocabulary; None for bytes.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        split: str = 'train',
        holdout: float = 0.05,
        tokenizer: Any = None,
    ):
        """Lists the files.

        Args:
            path: a file, a pattern such as 'books/**/*.txt', or several of these.
            split: 'train' or 'test'.
            holdout: fraction of the files in the test split.
            tokenizer: as for `data.tokens.TokenizedText`; the files are then read as UTF-8. None
                for bytes.

        Raises:
            ValueError: if there is no such file, the split has no files, or an argument is out of
                range.
        """
        _check_split(split, holdout)
        files = [file for pattern in _as_list(path) for file in _list_files(pattern)]
        boundary = len(files) - round(holdout * len(files))
        self._files = files[:boundary] if split == 'train' else files[boundary:]
        self._tokenizer = tokenizer
        self.vocabulary: str | None = None if tokenizer is None else tokenizer.checksum
        if not self._files:
            raise ValueError(
                f'split {split!r} gets none of {len(files)} files: use more files, or another '
                'holdout'
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Arrays:
        content = _read_file(self._files[index])
        if self._tokenizer is None:
            return {'tokens': np.frombuffer(content, np.uint8).astype(np.int32)}
        [tokens] = self._tokenizer.encode([_decode(content, self._files[index])])
        return {'tokens': np.append(tokens, np.int32(self._tokenizer.end))}

    def describe(self, index: int) -> str:
        """Returns the name of a document for messages: its file."""
        return self._files[index]


def python_documents(
    *, split: str = 'train', holdout: float = 0.05, tokenizer: Any = None
) -> Documents:
    """Returns the files of Python's standard library as documents.

    Args:
        split: 'train' or 'test'.
        holdout: fraction of the files in the test split.
        tokenizer: as for `Documents`.

    Raises:
        ValueError: as `Documents`.
    """
    return Documents(_python_files(), split=split, holdout=holdout, tokenizer=tokenizer)


def python_source(
    seq_len: int, *, split: str = 'train', holdout: float = 0.05, limit: int | None = None
) -> Bytes:
    """Returns the source code of Python's standard library: a few megabytes, without a download.

    The text is always the same for one Python installation, but differs between versions.

    Args:
        seq_len: tokens per sequence.
        split: 'train' or 'test'.
        holdout: fraction of the text in the test split.
        limit: use only this many sequences from the start of the split.

    Raises:
        ValueError: as `Bytes`.
    """
    return Bytes(_python_files(), seq_len, split=split, holdout=holdout, limit=limit)


def read_texts(
    path: str | Sequence[str] | None = None, *, split: str = 'train', holdout: float = 0.05
) -> list[str]:
    """Returns the texts of files, for `data.tokens.TokenizedText` and `data.bpe.train`.

    The end of all texts together is the test split; a text on the border is split between two
    lines.

    Args:
        path: a file, a pattern such as 'books/**/*.txt', or several of these, in UTF-8; None for
            the source code of Python's standard library.
        split: 'train' or 'test'.
        holdout: fraction of the text in the test split.

    Raises:
        ValueError: if there is no such file, one cannot be read or is not UTF-8, the split has no
            text, or an argument is out of range.
    """
    _check_split(split, holdout)
    patterns = _python_files() if path is None else _as_list(path)
    files = [file for pattern in patterns for file in _list_files(pattern)]
    total = sum(map(os.path.getsize, files))
    left = total - round(holdout * total)
    texts = []
    for file in files:
        size = os.path.getsize(file)
        # One file at a time: only the texts of the split are in memory.
        if left > 0 if split == 'train' else left < size:
            texts.append(_read_part(file, left, split))
        left -= size
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(
            f'split {split!r} has none of {total:,} bytes: use more text, or another holdout'
        )
    return texts


def _read_part(file: str, left: int, split: str) -> str:
    """Returns the text of a file that belongs to a split, if `left` bytes are left for training."""
    content = _read_file(file)
    border = _find_border(content, left)
    part = content[:border] if split == 'train' else content[border:]
    return _decode(part, file)


def _find_border(content: bytes, left: int) -> int:
    """Returns how many bytes belong to training if `left` should: a whole number of lines."""
    if 0 < left < len(content):
        return content.find(b'\n', left - 1) + 1 or len(content)
    return max(0, min(left, len(content)))


def _python_files() -> list[str]:
    root = sysconfig.get_path('stdlib')
    files: list[str] = []
    for directory, subdirectories, names in os.walk(root):
        # The '-' excludes 'site-packages' and 'config-3.11-x86_64-linux-gnu'.
        subdirectories[:] = [
            name for name in subdirectories if name not in _EXCLUDED and '-' not in name
        ]
        # '_sysconfigdata...' files describe the build of this Python, and differ by machine.
        code = [n for n in names if n.endswith('.py') and not n.startswith('_sysconfigdata')]
        files += [os.path.join(directory, name) for name in code]
    if not files:
        raise ValueError(f'no source code of the standard library in {root}')
    return sorted(files)


def _check_split(split: str, holdout: float) -> None:
    if split not in ('train', 'test'):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f'holdout: expected a fraction in [0, 1), got {holdout}')


def _as_list(path: str | Sequence[str]) -> Sequence[str]:
    return [path] if isinstance(path, str) else path


def _read_file(file: str) -> bytes:
    try:
        with open(file, 'rb') as opened:
            return opened.read()
    except OSError as error:
        raise ValueError(f'{file} cannot be read: {error}') from error


def _decode(content: bytes, file: str) -> str:
    try:
        # Without the byte order mark that some editors write.
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{file} is not UTF-8: {error}') from error


def _list_files(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isfile(path):  # Its name may have brackets.
        return [path]
    files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not files:
        raise ValueError(
            f'path: no file matches {path!r}, relative to {os.getcwd()}. For all files of a '
            "directory, write 'directory/*.txt'"
        )
    return files
