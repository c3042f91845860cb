# SPDX-License-Identifier: Apache-2.0
"""The random generators that belong to the whole process: `random`, `numpy.random` and PyTorch.

PyTorch takes part if the program has imported it; this module does not import it.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

# Only one thread at a time may seed them, or compare their states.
lock = threading.Lock()


def seed(number: int) -> None:
    """Seeds all of them, with a number below 2**32."""
    random.seed(number)
    np.random.seed(number)
    if torch := _torch():
        torch.default_generator.manual_seed(number)


@contextlib.contextmanager
def restore_after() -> Iterator[None]:
    """Holds the lock for the block, and restores the generators after it."""
    with lock:
        python, numpy = random.getstate(), np.random.get_state()
        torch = _torch()
        pytorch = None if torch is None else torch.get_rng_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if torch is not None:
                torch.set_rng_state(pytorch)


def states() -> dict[str, Any]:
    """Returns their states by name, to be compared."""
    numpy = _comparable(np.random.get_state(legacy=False))
    found: dict[str, Any] = {'random': random.getstate(), 'numpy.random': numpy}
    if torch := _torch():
        found['torch'] = torch.get_rng_state().numpy().tobytes()
    return found


def changed_since(before: dict[str, Any]) -> list[str]:
    """Returns the names of the generators whose state has changed.

    Args:
        before: what `states` returned. A generator that is not in there has not changed.
    """
    return [name for name, state in states().items() if state != before.get(name, state)]


def _comparable(value: Any) -> Any:
    """Returns a state of numpy, nested dicts, with the arrays in it as bytes."""
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _torch() -> Any:
    """Returns PyTorch, or None."""
    return sys.modules.get('torch')
