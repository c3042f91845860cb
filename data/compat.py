# SPDX-License-Identifier: Apache-2.0
"""All uses of private parts or message texts of libraries that read data.

Each function says with which version it was checked, why there is no public way, and what breaks
without it; tests/data/test_compat.py has a test for each.
"""

from __future__ import annotations

from typing import Any


def mark_grain_flags_parsed() -> None:
    """Lets Grain read its absl flags in a program that has not parsed flags, such as a notebook.

    Checked with: grain 0.2.18 and absl-py 2.5.1.
    Why: Grain reads its flags when it starts processes, and absl raises before flags are parsed;
    `FLAGS.mark_as_parsed` would mark the user's flags too.
    Without it: a notebook cannot use worker processes.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        for name in flags.FLAGS:
            if name.startswith('grain_'):
                flags.FLAGS[name].present = 1  # Lets absl return its value.


def worker_death_cause(error: RuntimeError) -> str:
    """Returns the first sentence of Grain's error about a worker process that has died.

    Checked with: grain 0.2.18, whose message continues with advice for other causes.
    Without it: our message is longer.
    """
    return str(error).split('. ')[0]


def locate_record(records: Any, index: int) -> tuple[int, int]:
    """Returns the index of the file that contains a record, and the index of the record in it.

    Checked with: array_record 0.8.6.
    Why: the number of records per file is private too.
    Without it: an error cannot name the damaged record.

    Args:
        records: a `grain.ArrayRecordDataSource`.
        index: index of the record over all files.
    """
    file, position = records._reader_idx_and_position(index)
    return int(file), int(position)


def is_decoded(feature: Any) -> bool:
    """Whether `datasets` decodes the stored bytes of a feature into an object (image, audio).

    Checked with: datasets 5.2.0.
    Why: its features share no base class, and there is no list of those that decode. `Json` is
    excluded: it decodes into what Arrow holds already.
    Without it: images are read as structs of bytes.
    """
    is_json = type(feature).__name__ == 'Json'
    return hasattr(feature, 'decode_example') and getattr(feature, 'decode', True) and not is_json
