# SPDX-License-Identifier: Apache-2.0
"""Between two rows of metrics, the host does not wait for the devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests import command
from trainer.experiment import load_and_build
from trainer.trainer import Trainer

# Every conversion of an array to numbers on the host calls this.
ARRAY: Any = type(jnp.zeros(()))


def fetches(patch: pytest.MonkeyPatch, steps: int, every: int) -> int:
    """Returns how often a run of `steps` steps, with a row `every` steps, waits for an array."""
    waits: list[Any] = []
    value, block = ARRAY._value, jax.block_until_ready

    def fetch(array: Any) -> Any:
        if array._npy_value is None:
            waits.append(array.shape)
        return value.fget(array)

    def record_block(x: Any) -> Any:
        waits.append(x)
        return block(x)

    options: dict[str, Any] = {
        'data__source__limit': 320, 'evals': {}, 'checkpoint__every': 'never',
        'train_for': f'{steps} steps', 'log__every': f'{every} steps',
    }  # fmt: skip
    path = str(command.ROOT / 'configs' / 'mnist_mlp.py')
    trainer = Trainer(load_and_build(path, **options))
    with patch.context() as patched:
        patched.setattr(ARRAY, '_value', property(fetch))
        patched.setattr(jax, 'block_until_ready', record_block)
        trainer.fit()
    return len(waits)


@pytest.mark.slow
def test_steps_between_rows_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of waits depends on the number of rows, not of steps."""
    one_row = fetches(monkeypatch, 3, 3)
    assert one_row > 0
    assert fetches(monkeypatch, 12, 12) == one_row
    assert fetches(monkeypatch, 12, 3) > one_row
