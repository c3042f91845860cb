# SPDX-License-Identifier: Apache-2.0
"""The standard streams of a process; imported before all else, so of the standard library only."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Gives a process that was started with `>&-` an output that leads nowhere.

    Else the next file that it opens would take the number of standard output, and whatever a C++
    library prints.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest number that is free: this one.
            setattr(sys, name, open(number, 'w' if number else 'r'))  # noqa: SIM115
