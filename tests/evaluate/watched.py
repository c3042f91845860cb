# SPDX-License-Identifier: Apache-2.0
"""A transform that records what an evaluation reads, and can wait for the test."""

from __future__ import annotations

import pathlib
import time
from typing import Any


class Watched:
    """Records the examples of each call in the file `seen`. At its `hold_at`-th call it creates the
    file `begun`, and waits for the file `go`.
    """

    def __init__(self, directory: str, hold_at: int = 0):
        self._directory = pathlib.Path(directory)
        self._hold_at = hold_at
        self._calls = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        with (self._directory / 'seen').open('a') as file:
            file.write(f'{len(batch["label"])}\n')
        if self._calls == self._hold_at:
            (self._directory / 'begun').touch()
            while not (self._directory / 'go').exists():
                time.sleep(0.01)
        return batch


def override(directory: pathlib.Path, hold_at: int = 0) -> str:
    """Returns the override that puts it into the evaluation `test`."""
    target = f'"target": "{__name__}:Watched", "directory": "{directory}", "hold_at": {hold_at}'
    return f'--config.evals.test.data.transforms=({{{target}}},)'
