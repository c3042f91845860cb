# SPDX-License-Identifier: Apache-2.0
"""States to save, and saves that are delayed or fail."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def state(seed: int = 0) -> dict[str, Any]:
    """Large enough that Orbax writes a file for each matrix."""
    rng = np.random.default_rng(seed)
    return {
        'params': {'kernel': jnp.asarray(rng.normal(size=(60, 70)).astype('f4'))},
        'count': jnp.int32(seed),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Delayed(dict[str, Any]):
    """JSON values whose writing waits for `release`: until then the save is not committed."""

    def __init__(self, **values: Any):
        super().__init__(**values)
        self.reached = threading.Event()
        self.release = threading.Event()

    def items(self) -> Iterable[tuple[str, Any]]:  # type: ignore[override]
        self.reached.set()
        assert self.release.wait(60)
        return super().items()


class Unwritable(dict[str, Any]):
    """JSON values whose writing fails."""

    def __init__(self, error: Exception):
        super().__init__(x=1)
        self._error = error

    def items(self) -> Iterable[tuple[str, Any]]:  # type: ignore[override]
        raise self._error
