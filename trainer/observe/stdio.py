# SPDX-License-Identifier: Apache-2.0
"""Opens closed standard input and output; imported first, so it needs only `os` and `sys`."""

from __future__ import annotations

import os
import sys


def open_closed_stdio() -> None:
    """Opens /dev/null in place of closed standard input or output, as with `>&-`.

    Otherwise the next file to be opened would get the descriptor of standard output, and whatever
    a C++ library prints would end up in it.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Gets the lowest free descriptor: this one.
            setattr(sys, name, open(number, 'w' if number else 'r'))  # noqa: SIM115
