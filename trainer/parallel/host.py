# SPDX-License-Identifier: Apache-2.0
"""Results on the host."""

from __future__ import annotations

from typing import Any

import jax


def fetch(tree: Any) -> Any:
    """Returns the tree's arrays as numpy arrays, in one transfer; raises what their program raised.

    Waits first: on CPUs a copy of what a failed program gave may wait for ever.
    """
    return jax.device_get(jax.block_until_ready(tree))
