# SPDX-License-Identifier: Apache-2.0
"""Every reliance on private parts or message texts of the libraries that data is read with.

Each function says which version it was checked with, why there is no public way, and what breaks
without it; tests/data/test_compat.py names the one that a new version breaks.
"""

from __future__ import annotations

from typing import Any


def mark_grain_flags_parsed() -> None:
    """Lets Grain read its absl flags in a program that has not parsed any, such as a notebook.

    Checked with: grain 0.2.18 and absl-py 2.5.1.
    Why: Grain reads its flags when it starts processes, and absl refuses that before a parse;
    `FLAGS.mark_as_parsed` would speak for the user's flags too.
    Without it: a notebook cannot use worker processes.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith('grain_'):
                flags.FLAGS[name].present = 1


def worker_death(error: RuntimeError) -> str:
    """Returns the first sentence of Grain's error about a worker process that has died.

    Checked with: grain 0.2.18, whose text goes on with advice for other causes.
    Without it: a message is longer.
    """
    return str(error).split('. ')[0]


def record_place(records: Any, index: int) -> tuple[int, int]:
    """Returns the number of the file that holds a record, and the record's place in it.

    Checked with: array_record 0.8.6.
    Why: the numbers of records in the files are private too.
    Without it: an error cannot name the record that is damaged.

    Args:
        records: a `grain.ArrayRecordDataSource`.
        index: of the record among those of all files.
    """
    file, place = records._reader_idx_and_position(index)
    return int(file), int(place)


def is_decoded(feature: Any) -> bool:
    """Whether `datasets` makes an object of the stored bytes, as of an image or a sound.

    Checked with: datasets 5.2.0, whose features share no base class and no list of those that
    decode.
    Why: `Json` decodes into what Arrow holds already.
    Without it: images are read as structs of bytes.
    """
    is_json = type(feature).__name__ == 'Json'
    return hasattr(feature, 'decode_example') and getattr(feature, 'decode', True) and not is_json
