# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of data: the number of examples, and checksums of the first one and of tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.input.data import Data


def fingerprint(data: Data) -> dict[str, Any]:
    """Returns the number of examples, and dtype, shape and checksum of each field of the first one.

    If the loader has a vocabulary, its checksum, too. Processes compare it to detect that they read
    different data; checkpoints save it as JSON.
    """
    first = {
        # Without the batch dimension, which differs between `first` and a batch.
        name: f'{x.dtype} {x.shape[1:]} {zlib.crc32(_content(x)):08x}'
        for name, x in data.first_example().items()
    }
    vocabulary = {} if data.vocabulary is None else {'vocabulary': data.vocabulary}
    return {'examples': data.examples, 'first example': first, **vocabulary}


def check_vocabulary(
    data: Data,
    before: Mapping[str, Any] | None,
    where: str,
    otherwise: str = 'train another model, in a --workdir of its own',
) -> None:
    """Checks that tokens are those of a saved fingerprint.

    Args:
        data: the data of today.
        before: the fingerprint, or None for one without a first example.
        where: what has the fingerprint, for the message.
        otherwise: what to do if the vocabulary should be another one, for the message.

    Raises:
        UserError: if the vocabulary is another one.
    """
    old, new = (before or {}).get('vocabulary'), data.vocabulary
    if _may_be_equal(old, new):
        return
    raise UserError(
        f'{where} is of a model of other tokens: the checksum of their vocabulary was {old}, that '
        f'of the data is {new}. Use the vocabulary of that run again (one that is made from texts '
        f'needs the same texts), or {otherwise}'
    )


def check_evaluated_vocabulary(data: Data, trained: Data, where: str) -> None:
    """Checks that tokens to evaluate are those that a model is trained on.

    Args:
        data: what is evaluated.
        trained: the training data.
        where: what has the data to evaluate, for the message.

    Raises:
        UserError: if the vocabulary is another one.
    """
    if _may_be_equal(trained.vocabulary, data.vocabulary):
        return
    raise UserError(
        f'{where} has other tokens than config.data: the checksum of its vocabulary is '
        f'{data.vocabulary}, that of training is {trained.vocabulary}. Give both the same '
        'vocabulary: the one that is made from the texts of training'
    )


def _may_be_equal(old: str | None, new: str | None) -> bool:
    # Data of no known vocabulary is not compared.
    return old is None or new is None or old == new


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two fingerprints."""
    changes = []
    old, new = before['examples'], now['examples']
    if old != new:
        counts = ['a stream' if n is None else f'{n:,} examples' for n in (old, new)]
        changes.append(f'{counts[0]} before, {counts[1]} now')
    old_first, new_first = before['first example'], now['first example']
    names = {**old_first, **new_first}
    fields = [name for name in names if old_first.get(name) != new_first.get(name)]
    if fields:
        changes.append(f'the first example differs in {", ".join(fields)}')
    return changes


def _content(x: np.ndarray) -> bytes:
    # The bytes of an object array are addresses, which differ between processes.
    return repr(x.tolist()).encode() if x.dtype.hasobject else x.tobytes()
