# SPDX-License-Identifier: Apache-2.0
"""A hook that prints when the first training step was done, and the peak memory at the end."""

from __future__ import annotations

import json
import os
import resource
import time
from typing import Any

import jax

_figures: dict[str, float] = {}


def measure(event: Any) -> None:
    """Prints one JSON object at the end of the run."""
    if event.kind == 'log' and event.step == 1:
        jax.block_until_ready(event.state)
        _figures['first_step_secs'] = time.time() - float(os.environ['BENCHMARK_BEGAN'])
    if event.kind == 'end':
        _figures['peak_mb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print('\nFIGURES ' + json.dumps(_figures))
