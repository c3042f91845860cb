# SPDX-License-Identifier: Apache-2.0
"""Text for language models: bytes as tokens, cut into sequences, held in memory."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence

import numpy as np

from .sources import Arrays, ArraySource, ArraySpec

# Parts of the standard library that say little of Python, or that not every installation has.
_LEFT_OUT = (
    '__pycache__', 'distutils', 'encodings', 'ensurepip', 'idlelib', 'lib2to3', 'pydoc_data',
    'test', 'tests', 'tkinter', 'turtledemo', 'venv',
)  # fmt: skip


class Bytes(ArraySource):
    """The bytes of text files as tokens 0..255, in sequences that do not overlap.

    The files are one text, in the order of their names. Its end is the test split, the rest is for
    training; what does not fill a sequence at the end of a split is left out.

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
            seq_len: tokens of a sequence.
            split: 'train' or 'test'.
            holdout: fraction of the text that is the test split.
            limit: use only this many sequences from the start of the split.

        Raises:
            ValueError: if there is no such file, the split is shorter than a sequence, or an
                argument is out of its range.
        """
        _check_split(split, holdout)
        if seq_len < 1:
            raise ValueError(f'seq_len: {seq_len} tokens; expected a positive number')
        text = _read(_listed(path))
        border = len(text) - round(holdout * len(text))
        tokens = text[:border] if split == 'train' else text[border:]
        used = (len(tokens) - 1) // seq_len * seq_len
        if used < 1:
            raise ValueError(
                f'split {split!r} has {len(tokens):,} of {len(text):,} bytes; a sequence of '
                f'{seq_len} and the byte after it need {seq_len + 1}: give more text, a shorter '
                'seq_len or another holdout'
            )
        # Views of the same bytes: four times smaller than int32, eight times than both fields.
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
        return {name: x.astype(np.int32) for name, x in super().gather(indices).items()}


class Documents:
    """Text files as documents of different lengths, read when they are asked for.

    The last of the files, in the order of their names, are the test split. Packed or cut into
    sequences by the stages of a stream, see `trainer.data.stages`.

    Field: `tokens` int32 (bytes,), 0..255.
    """

    def __init__(self, path: str | Sequence[str], *, split: str = 'train', holdout: float = 0.05):
        """Lists the files.

        Args:
            path: a file, a pattern such as 'books/**/*.txt', or several of these.
            split: 'train' or 'test'.
            holdout: fraction of the files that is the test split.

        Raises:
            ValueError: if there is no such file, the split has none, or an argument is out of its
                range.
        """
        _check_split(split, holdout)
        files = [file for one in _listed(path) for file in _matching(one)]
        border = len(files) - round(holdout * len(files))
        self._files = files[:border] if split == 'train' else files[border:]
        if not self._files:
            raise ValueError(
                f'split {split!r} has none of {len(files)} files: give more files, or another '
                'holdout'
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Arrays:
        return {'tokens': np.fromfile(self._files[index], np.uint8).astype(np.int32)}

    def describe(self, index: int) -> str:
        """Returns what messages call a document: its file."""
        return self._files[index]


def python_documents(*, split: str = 'train', holdout: float = 0.05) -> Documents:
    """Returns the files of Python's standard library as documents.

    Args:
        split: 'train' or 'test'.
        holdout: fraction of the files that is the test split.

    Raises:
        ValueError: as `Documents`.
    """
    return Documents(_python_files(), split=split, holdout=holdout)


def python_source(
    seq_len: int, *, split: str = 'train', holdout: float = 0.05, limit: int | None = None
) -> Bytes:
    """Returns the source code of Python's standard library: some megabytes, without a download.

    Always the same on one installation of Python; another version has another text.

    Args:
        seq_len: tokens of a sequence.
        split: 'train' or 'test'.
        holdout: fraction of the text that is the test split.
        limit: use only this many sequences from the start of the split.

    Raises:
        ValueError: as `Bytes`.
    """
    return Bytes(_python_files(), seq_len, split=split, holdout=holdout, limit=limit)


def _python_files() -> list[str]:
    root = sysconfig.get_path('stdlib')
    files: list[str] = []
    for directory, below, names in os.walk(root):
        # No 'site-packages', and no 'config-3.11-x86_64-linux-gnu'.
        below[:] = [name for name in below if name not in _LEFT_OUT and '-' not in name]
        # The files '_sysconfigdata...' are of this machine's build too.
        code = [n for n in names if n.endswith('.py') and not n.startswith('_sysconfigdata')]
        files += [os.path.join(directory, name) for name in code]
    if not files:
        raise ValueError(f"this Python has its library's source code not in {root}")
    return sorted(files)


def _check_split(split: str, holdout: float) -> None:
    if split not in ('train', 'test'):
        raise ValueError(f'split: {split!r} is none of train, test')
    if not 0 <= holdout < 1:
        raise ValueError(f'holdout: {holdout}; expected a fraction of the text, in [0, 1)')


def _listed(path: str | Sequence[str]) -> Sequence[str]:
    return [path] if isinstance(path, str) else path


def _read(paths: Sequence[str]) -> np.ndarray:
    """Returns the bytes of all files, uint8 (bytes,)."""
    files = [file for path in paths for file in _matching(path)]
    try:
        return np.concatenate([np.fromfile(file, np.uint8) for file in files])
    except OSError as error:
        raise ValueError(f'the text cannot be read: {error}') from error


def _matching(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isfile(path):  # Its name may have brackets.
        return [path]
    files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
    if not files:
        raise ValueError(
            f'path: {path!r} is no file and matches none; relative to {os.getcwd()}. A directory '
            "is written 'directory/*.txt'"
        )
    return files
