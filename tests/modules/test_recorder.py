# SPDX-License-Identifier: Apache-2.0
"""The recorder of modules: what is recorded, in which order, and perturbations of outputs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.modules.examples import X, bind
from trainer.modules import recorder
from trainer.modules.recorder import ModuleRecorder


class Net(nn.Module):
    """Two layers, the second of which is called twice; sows a value of its own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name='first')(x)
        self.sow('intermediates', 'own', x)
        second = nn.Dense(4, name='second')
        return second(second(x))


def record_mean(output: Any, inputs: Any, variables: Any) -> Any:
    return output.mean()


def test_calls_are_recorded_by_path_and_ordered() -> None:
    model, found = bind(Net()), ModuleRecorder(record_mean)
    model.attach(found)
    output = model(X)
    calls = recorder.order_records(jax.device_get(found.records))
    assert [call.name for call in calls] == ['first', 'second', 'second#1', '(model)']
    assert calls[-1].path == '' and calls[-1].value == pytest.approx(float(output.mean()))
    assert found.called == {'': 'Net', 'first': 'Dense', 'second': 'Dense'}
    assert list(found.sown[0]) == ['own']
    assert list(model.intermediates) == ['own']


def test_only_selected_modules_are_recorded() -> None:
    model, found = bind(Net()), ModuleRecorder(record_mean, selects=lambda path: path == 'first')
    model.attach(found)
    model(X)
    assert [list(call) for call in found.records] == [['first']]


def test_later_records_can_be_forgotten() -> None:
    model, found = bind(Net()), ModuleRecorder(record_mean)
    model.attach(found)
    model(X)
    records = found.records
    forget = model.remember()
    model(X)
    assert len(records) == 2
    forget()
    assert found.records is records and len(records) == 1


def test_the_gradient_of_a_perturbation_is_that_of_the_output() -> None:
    def loss(perturbations: Any) -> Any:
        model, found = bind(Net()), ModuleRecorder(perturbations=perturbations)
        model.attach(found)
        return (model(X) ** 2).sum(), (found.perturbations, 2 * model(X))

    _, (zeros, _) = loss({})
    gradients, (_, expected) = jax.grad(loss, has_aux=True)(zeros)
    np.testing.assert_allclose(gradients['_recorder_0_3_4'], expected, rtol=1e-5)
    assert {'first', 'second', '_recorder_0_3_4'} == set(gradients)


def test_layers_of_a_scan_follow_one_another() -> None:
    def each(order: int) -> Any:
        values = np.arange(2) + 10 * order
        return ({'order': np.full(2, order), 'value': values},)

    calls = recorder.order_records([{'blocks/b': each(2), 'blocks/a': each(1)}])
    assert [(call.name, int(call.value)) for call in calls] == [
        ('blocks/a[0]', 10), ('blocks/b[0]', 20), ('blocks/a[1]', 11), ('blocks/b[1]', 21),
    ]  # fmt: skip


def test_names_of_outputs_contain_number_and_shape() -> None:
    name = recorder.output_name(2, jnp.zeros((32, 10)))
    assert (name, recorder.output_number(name)) == ('_recorder_2_32_10', 2)
    assert recorder.output_number('nudge') is None


@pytest.mark.parametrize(
    ('value', 'expected'),
    [(jnp.zeros(1), True), (jnp.zeros(1, jnp.bfloat16), True), (jnp.zeros(1, int), False),
     (1.5, False), (None, False)],
)  # fmt: skip
def test_only_float_arrays_have_gradients(value: Any, expected: bool) -> None:
    assert recorder.is_float(value) is expected
