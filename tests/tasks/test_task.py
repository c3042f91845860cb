# SPDX-License-Identifier: Apache-2.0
"""Results of tasks: what is converted, and which names are refused."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from trainer.config.errors import UserError
from trainer.tasks import TaskOutput
from trainer.tasks.task import as_output


@pytest.mark.parametrize(
    ('extra', 'name'),
    [
        ({'metrics': {'loss': jnp.zeros(4)}}, "metric 'loss'"),
        ({'metrics': {'weights': jnp.zeros(4)}}, "metric 'weights'"),
        ({'metrics': {'examples': jnp.zeros(4)}}, "metric 'examples'"),
        ({'penalties': {'loss': jnp.zeros(())}}, "penalty 'loss'"),
        ({'penalties': {'grad_norm': jnp.zeros(())}}, "penalty 'grad_norm'"),
        ({'metrics': {'l2': jnp.zeros(4)}, 'penalties': {'l2': jnp.zeros(())}}, "penalty 'l2'"),
        ({'loss': {'a': jnp.ones(4)}, 'metrics': {'a_loss': jnp.zeros(4)}}, "metric 'a_loss'"),
    ],
)
def test_reserved_metric_names_are_rejected(extra: dict[str, Any], name: str) -> None:
    """A metric called 'weights' would replace the weights of all means."""
    with pytest.raises(UserError, match=f'names a {name}, but this name is reserved'):
        as_output(TaskOutput(**{'loss': jnp.ones(4), **extra}))
    as_output(TaskOutput(loss=jnp.ones(4), metrics={'l1': jnp.ones(4)}, penalties={'l2': 1.0}))
