# SPDX-License-Identifier: Apache-2.0
"""Which fields are sent to the devices, and how a batch records reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.data.sources import ArraySpec
from trainer.input.fields import Fields, device_dtype
from trainer.input.host_field import HostField
from trainer.tasks.batch import Batch, device_fields, record_reads
from trainer.tasks.runner import TaskRunner

IDS = np.array([[5, 6], [-1, 7]])
SPEC = {
    'x': ArraySpec((4, 3), np.dtype('float32')),
    'label': ArraySpec((4,), np.dtype('int64')),
    'id': ArraySpec((4,), np.dtype('int64')),
    'name': ArraySpec((4,), np.dtype('<U3')),
}


@pytest.mark.parametrize(
    ('dtype', 'held'),
    [
        ('int64', 'int32'), ('uint64', 'uint32'), ('float64', 'float32'),
        ('complex128', 'complex64'), ('int32', 'int32'), ('bool', 'bool'), ('uint8', 'uint8'),
        (jnp.bfloat16, jnp.bfloat16), ('<U5', None), ('S3', None), ('O', None), ('M8[s]', None),
        ('m8[s]', None), ([('a', 'i4')], None), ('longdouble', None),
    ],
)  # fmt: skip
def test_dtypes_that_devices_store(dtype: Any, held: Any) -> None:
    assert device_dtype(np.dtype(dtype)) == (None if held is None else np.dtype(held))


def convert(x: Any) -> np.ndarray:
    x = np.asarray(x)
    fields = Fields.from_spec({'x': ArraySpec((2, *x.shape[2:]), x.dtype)}, 'config.data')
    return fields.to_device_dtypes({'x': x}, IDS)['x']


@pytest.mark.parametrize(
    ('values', 'dtype'),
    [
        ([[2**31 - 1, -(2**31)], [0, 1]], 'int64'), ([[2**32 - 1, 0], [0, 1]], 'uint64'),
        ([[1e-300, 3e38], [np.inf, np.nan]], 'float64'), ([[0.1, -np.inf], [0, 1]], 'float64'),
        ([[1 + 2j, 0], [complex(np.nan, np.inf), 1]], 'complex128'),
    ],
)  # fmt: skip
def test_values_that_fit_are_converted(values: Any, dtype: str) -> None:
    x = np.array(values, dtype)
    found = convert(x)
    assert found.dtype == device_dtype(x.dtype)
    np.testing.assert_array_equal(found, x.astype(found.dtype))


def test_arrays_that_need_no_conversion_are_not_copied() -> None:
    x = np.ones((2, 2, 3), np.float32)
    assert convert(x) is x


@pytest.mark.parametrize(
    ('value', 'dtype'),
    [
        (2**31, 'int64'), (-(2**31) - 1, 'int64'), (2**40, 'uint64'), (2**32, 'uint64'),
        (1e39, 'float64'), (-1e300, 'float64'), (1e39j, 'complex128'),
    ],
)  # fmt: skip
@pytest.mark.parametrize(('place', 'example'), [((0, 1), 6), ((1, 1), 7), ((1, 0), -1)])
def test_values_that_do_not_fit_are_an_error(
    value: Any, dtype: str, place: tuple[int, int], example: int
) -> None:
    x = np.zeros((2, 2, 3), dtype)
    x[(*place, 2)] = value
    with pytest.raises(UserError) as info:
        convert(x)
    message = str(info.value)
    assert (
        f"config.data: the field 'x' of example {example} has the value {x[(*place, 2)]},"
        in message
    )
    assert f'store {dtype} as {device_dtype(x.dtype)}' in message


def test_error_names_a_real_example_and_not_padding() -> None:
    x = np.array([[0, 0], [2**40, 2**40]])
    with pytest.raises(UserError, match='of example 7 '):
        convert(x)


def runner(task: Any = None, *transforms: Any, kept: Any = None) -> TaskRunner:
    made = TaskRunner.from_task(task or (lambda model, batch: batch['x'][:, 0]), transforms)
    return made.with_host_fields(Fields.from_spec(SPEC, '').host_fields() if kept is None else kept)


def arrays() -> dict[str, jax.Array]:
    return {n: jnp.zeros(s.shape, s.dtype) for n, s in Fields.from_spec(SPEC, '').shapes.items()}


def reads(read: Callable[[Any], Any], *transforms: Any) -> set[str]:
    """Names of the fields that a task reads; the batch has no text."""
    made = runner(read, *transforms, kept=())
    with record_reads() as found:
        jax.eval_shape(
            lambda batch: (made.task(None, made.prepare_batch(batch, None)), ())[1], arrays()
        )
    return found.names


EVERYTHING = {'x', 'label', 'id'}


@pytest.mark.parametrize(
    ('read', 'names'),
    [
        (lambda model, batch: batch['x'], {'x'}),
        (lambda model, batch: (batch.get('x'), batch.get('nothing')), {'x'}),
        (lambda model, batch: ('x' in batch, list(batch), len(batch), batch.keys()), set()),
        (lambda model, batch: batch.pop('label'), {'label'}),
        (lambda model, batch: batch.pop('nothing', None), set()),
        (lambda model, batch: batch.setdefault('label', 1), {'label'}),
        (lambda model, batch: dict(batch), EVERYTHING),
        (lambda model, batch: {**batch}, EVERYTHING),
        (lambda model, batch: (lambda **fields: fields)(**batch), EVERYTHING),
        (lambda model, batch: batch | {}, EVERYTHING),
        (lambda model, batch: {} | batch, EVERYTHING),
        (lambda model, batch: batch.copy(), EVERYTHING),
        (lambda model, batch: list(batch.items()), EVERYTHING),
        (lambda model, batch: list(batch.values()), EVERYTHING),
        (lambda model, batch: jax.tree.map(lambda x: x, batch), EVERYTHING),
        (lambda model, batch: jax.jit(lambda b: b['x'])(batch), EVERYTHING),
        (lambda model, batch: [batch[name] for name in batch if name != 'id'], {'x', 'label'}),
    ],
)
def test_reads_of_a_task_are_recorded(read: Any, names: set[str]) -> None:
    assert reads(read) == names
    assert reads(read, lambda batch: {**batch, 'x': batch['x'] + 1}) == names


def test_reads_through_transforms_are_recorded() -> None:
    def transform(batch: Any) -> dict[str, Any]:
        del_x = {name: value for name, value in batch.items() if name != 'x'}
        return {**del_x, 'y': jnp.where(batch['label'][:, None] > 0, batch['x'], 0.0), 'z': 1.0}

    assert reads(lambda model, batch: batch['y'], transform) == {'x', 'label'}
    assert reads(lambda model, batch: batch['label'], transform) == {'label'}
    assert reads(lambda model, batch: batch['z'], transform) == set()
    with pytest.raises(UserError, match=r"asks for batch\['x'\], and a batch holds"):
        reads(lambda model, batch: batch['x'], transform)


@pytest.mark.parametrize(
    'read',
    [
        lambda model, batch: batch['name'],
        lambda model, batch: dict(batch),
        lambda model, batch: {**batch},
        lambda model, batch: list(batch.values()),
        lambda model, batch: jax.tree.map(jnp.sum, batch),
    ],
)
@pytest.mark.parametrize('transforms', [(), (lambda batch: {**batch, 'x': batch['x'] + 1},)])
def test_reading_text_is_an_error(read: Any, transforms: Any) -> None:
    message = r"the task reads batch\['name'\] of dtype <U3, which devices cannot store"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda batch: runner(read, *transforms)(None, batch), arrays())


@pytest.mark.parametrize(
    'transform',
    [
        lambda batch: {**batch, 'x': batch['name'] + 'a'},
        lambda batch: {**batch, 'x': jnp.asarray(batch['name'])},
        lambda batch: {**batch, 'x': jax.nn.relu(batch['name'])},
        lambda batch: {**batch, 'x': batch['name'] == 'a'},
        lambda batch: {**batch, 'x': batch['name'].astype('int32')},
        lambda batch: {**batch, 'x': len(batch['name'])},
    ],
)
def test_transform_that_computes_with_text_is_an_error(transform: Any) -> None:
    with pytest.raises(UserError, match=r"batch\['name'\] of dtype <U3"):
        runner(None, transform)(None, arrays())


def test_field_that_is_read_only_in_later_traces_is_an_error() -> None:
    fields = Fields.from_spec(SPEC, '').with_sent({'x'})
    made = runner(lambda model, batch: batch['label'], kept=fields.host_fields())
    with pytest.raises(UserError, match=r"reads batch\['label'\], but did not"):
        made(None, {'x': jnp.zeros((4, 3))})
    through = runner(
        lambda model, batch: batch['y'],
        lambda b: {**b, 'y': b['label'] + 1},
        kept=fields.host_fields(),
    )
    with pytest.raises(UserError, match=r"reads batch\['y'\], but did not"):
        through(None, {'x': jnp.zeros((4, 3))})


def test_batch_is_a_dict_and_a_pytree() -> None:
    batch = Batch({'b': 1, 'a': 2}, 'the task')
    assert isinstance(batch, dict) and list(batch) == ['b', 'a'] and batch == {'a': 2, 'b': 1}
    assert jax.tree.leaves(batch) == [2, 1]
    again = jax.tree.map(lambda x: 10 * x, batch)
    assert isinstance(again, Batch) and again['a'] == 20
    assert jax.tree.structure(again) == jax.tree.structure(batch)
    assert batch.popitem() == ('a', 2) and list(batch) == ['b']
    hidden = HostField(Fields.from_spec(SPEC, '').host_fields()[0])
    assert device_fields(Batch({'x': 1, 'name': hidden}, 'the task')) == {'x': 1}
    assert (hidden.shape, hidden.ndim, hidden.size) == ((4,), 1, 4)
