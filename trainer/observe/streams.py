# SPDX-License-Identifier: Apache-2.0
"""The standard streams of a process; imported first, so it uses only the standard library."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Opens /dev/null for standard streams that are closed, as with `>&-`.

    Otherwise the next file that is opened would get the descriptor of standard output, and with it
    whatever a C++ library prints.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Gets the lowest free descriptor: this one.
            setattr(sys, name, open(number, 'w' if number else 'r'))  # noqa: SIM115
