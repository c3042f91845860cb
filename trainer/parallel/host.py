# SPDX-License-Identifier: Apache-2.0
"""Transfers arrays from the devices to the host."""

from __future__ import annotations

from typing import Any

import jax


def fetch(tree: Any) -> Any:
    """Returns the tree's arrays as numpy arrays, in one transfer.

    Raises the error of the program that computed them, if it failed.
    """
    # Wait first: on CPUs, copying the output of a failed program may block forever.
    return jax.device_get(jax.block_until_ready(tree))


def is_ready(array: Any) -> bool:
    """Whether the program that computes an array has finished: fetching it does not wait.

    Args:
        array: a `jax.Array`, whose class does not declare this method for type checkers.
    """
    return array.is_ready()
