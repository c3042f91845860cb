# SPDX-License-Identifier: Apache-2.0
"""Checks of single config values."""

from __future__ import annotations

from trainer.config.errors import UserError


def check_positive(value: int, path: str) -> int:
    """Returns the value.

    Args:
        value: a number of the config.
        path: its key path, for the message.

    Raises:
        UserError: if it is less than 1.
    """
    if value < 1:
        raise UserError(f'{path}: expected a positive number, got {value}')
    return value
