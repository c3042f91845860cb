# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding: a vocabulary that is made from texts at first use, and kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .words import load_tokenizer

PADDING, END = 0, 1
# The first tokens of a vocabulary, in the order of their numbers.
SPECIAL = ('<padding>', '<end>')


class BPE:
    """Tokens of texts by byte-pair encoding of their UTF-8 bytes: any text has tokens.

    0 is padding and 1 the end of a text; `encode` returns neither. No text is mistaken for one of
    them.

    Attributes:
        path: the file with the vocabulary, a `tokenizer.json` of Hugging Face.
        size: number of tokens.
    """

    def __init__(self, path: str):
        """Loads a vocabulary.

        Args:
            path: a file that `train` has written.

        Raises:
            ValueError: if there is no such file, it is not from `train`, or the library
                `tokenizers` is not installed.
        """
        self.path = path
        self._tokenizer = load_tokenizer(path)
        self._tokenizer.encode_special_tokens = True
        self.size: int = self._tokenizer.get_vocab_size()
        if [self._tokenizer.id_to_token(i) for i in range(len(SPECIAL))] != list(SPECIAL):
            raise ValueError(
                f'{path}: its first tokens are not {" and ".join(SPECIAL)}: expected a file that '
                'data.bpe.train has written'
            )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32 (n,); none for an empty text."""
        return [np.array(each.ids, np.int32) for each in self._tokenizer.encode_batch(list(texts))]

    def decode(self, tokens: Any) -> str:
        """Returns the text of tokens (n,) up to the first end, without padding.

        An incomplete character, of which some bytes are missing, becomes U+FFFD.
        """
        tokens = np.asarray(tokens)
        ends = np.flatnonzero(tokens == END)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        return str(self._tokenizer.decode(tokens[tokens != PADDING].tolist()))


def train(texts: Iterable[str], size: int, directory: str) -> str:
    """Returns the file with the vocabulary of some texts, which is made if it does not exist.

    The name of the file has a checksum of the texts, so a vocabulary of other texts is never taken
    for theirs. Processes that start together make the same file.

    Args:
        texts: what the vocabulary is made from: those of training.
        size: number of tokens, at least 258: 256 bytes, padding and the end of a text. Few texts
            may have fewer.
        directory: for the file; it is made if it does not exist.

    Raises:
        ValueError: if the size is too small, or the library `tokenizers` is not installed.
    """
    smallest = 256 + len(SPECIAL)
    if size < smallest:
        raise ValueError(
            f'size: {size} tokens; expected at least {smallest}, one for each byte, padding and '
            'the end of a text'
        )
    texts = list(texts)
    digest = hashlib.sha256(str(size).encode())
    for text in texts:
        # The length, too, so that texts that are joined are other ones.
        content = text.encode()
        digest.update(b'%d:' % len(content) + content)
    path = os.path.join(os.path.expanduser(directory), f'bpe_{size}_{digest.hexdigest()[:12]}.json')
    if not os.path.isfile(path):
        _write(path, _train(texts, size))
    return path


def _train(texts: list[str], size: int) -> str:
    """Returns the content of the file."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError(
            "the package 'tokenizers' is not installed: pip install tokenizers"
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        # In one order: that of the library differs between processes.
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _write(path: str, content: str) -> None:
    """Writes a file of which no process ever sees a part."""
    directory = os.path.dirname(path) or '.'
    os.makedirs(directory, exist_ok=True)
    # A name of its own for each process.
    temporary = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
