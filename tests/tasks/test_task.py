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


def test_plain_results_become_an_output() -> None:
    loss = jnp.arange(4.0)
    assert as_output(loss).loss is loss
    assert as_output({'a': loss}).loss == {'a': loss}
    output = as_output((loss, {'hits': loss}))
    assert output.loss is loss and output.metrics['hits'] is loss
    complete = TaskOutput(loss=loss, weights=loss)
    assert as_output(complete) is complete


@pytest.mark.parametrize(
    ('result', 'message'),
    [
        (None, 'returned None'),
        ({}, 'returned an empty dict of losses'),
        ({'not a name': jnp.ones(4)}, "names a loss 'not a name': expected a Python identifier"),
        ({'metrics': jnp.ones(4)}, "names a loss 'metrics'"),
        (
            TaskOutput(loss=jnp.ones(4), weights={'a': jnp.ones(4)}),
            "returned weights for 'a', which is not a loss; it names no losses",
        ),
        (
            TaskOutput(loss={'a': jnp.ones(4)}, weights={'b': jnp.ones(4)}),
            "returned weights for 'b', which is not a loss; it names the losses a",
        ),
        ((jnp.ones(4), {'top 5': jnp.ones(4)}), "names a metric 'top 5': expected a Python ident"),
        ((jnp.ones(4), {'class': jnp.ones(4)}), 'that is not a keyword'),
    ],
)
def test_invalid_results_are_explained(result: Any, message: str) -> None:
    with pytest.raises(UserError, match=f'^.*{message}'):
        as_output(result)


def test_inputs_of_a_collection_may_have_any_name_but_the_given_ones() -> None:
    as_output((jnp.ones(4), {'examples': jnp.ones(4)}), averaged=False)
    with pytest.raises(UserError, match="metric 'mask', but this name is reserved"):
        as_output((jnp.ones(4), {'mask': jnp.ones(4)}), averaged=False)
