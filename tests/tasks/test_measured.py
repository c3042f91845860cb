# SPDX-License-Identifier: Apache-2.0
"""Values that metrics may compute, and those rejected before the first step."""

from __future__ import annotations

from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.errors import UserError
from trainer.tasks.measured import (
    MetricValues,
    average_members,
    check_accumulates,
    check_computes,
    compute_on_trial,
)


@flax.struct.dataclass
class Total(clu.metrics.Metric):
    """A sum; subclasses change parts of it."""

    total: jax.Array

    @classmethod
    def empty(cls) -> Any:
        return cls(total=jnp.zeros(()))

    @classmethod
    def from_model_output(cls, loss: jax.Array, **_: Any) -> Any:
        return cls(total=loss.sum())

    def merge(self, other: Any) -> Any:
        return type(self)(total=self.total + other.total)


@flax.struct.dataclass
class Share(Total):
    """A metric that cannot be computed without data."""

    def compute(self) -> Any:
        return 1 / float(self.total)


@flax.struct.dataclass
class Absent(Total):
    def compute(self) -> Any:
        return self.total if self.total > 0 else None


@flax.struct.dataclass
class OfTwo(Total):
    def compute(self) -> Any:
        return 1 / float(self.total * (self.total - 1))


@flax.struct.dataclass
class Broken(Total):
    def compute(self) -> Any:
        return jnp.totl(self.total)  # type: ignore[attr-defined]


@flax.struct.dataclass
class Words(Total):
    def compute(self) -> Any:
        return {'grade': 'good'}


@flax.struct.dataclass
class Growing(Total):
    @classmethod
    def empty(cls) -> Any:
        return cls(total=jnp.zeros((0,)))

    def merge(self, other: Any) -> Any:
        return type(self)(total=jnp.concatenate([self.total, other.total[None]]))


@pytest.mark.parametrize(
    ('value', 'number'),
    [
        (True, 1),
        (3, 3),
        (0.5, 0.5),
        (np.bool_(False), 0),
        (np.float32(0.25), 0.25),
        (np.array([2]), 2),
        (np.array([[0.5]]), 0.5),
        (jnp.float32(1.5), 1.5),
        (jnp.bfloat16(1.5), 1.5),
    ],
)
def test_array_of_one_element_is_a_number(value: Any, number: float) -> None:
    found = MetricValues({'x': value})
    assert found == {'x': number}
    assert type(found['x']) is type(number)
    assert found.arrays == {}


def test_dicts_are_flattened_and_arrays_are_separate() -> None:
    found = MetricValues(
        {
            'loss': 0.5,
            'f1': {'macro': np.float32(0.75), 'of': {0: 1.0, 1: 0.5}},
            'confusion': {'test': np.eye(2)},
            'half': jnp.ones(3, jnp.bfloat16),
            'none': np.zeros(0, np.int32),
        }
    )
    assert found == {'loss': 0.5, 'f1/macro': 0.75, 'f1/of/0': 1.0, 'f1/of/1': 0.5}
    assert list(found.arrays) == ['confusion/test', 'half', 'none']
    assert found.arrays['half'].dtype == np.float32


@pytest.mark.parametrize(
    ('value', 'kind'),
    [
        ([1.0, 2.0], 'list'),
        ('good', 'str'),
        (None, 'NoneType'),
        (np.array(['good']), '<U4'),
        (np.complex64(1j), 'complex64'),
        (jax.random.key(0), 'key<fry>'),
    ],
)
def test_values_of_other_types_are_rejected(value: Any, kind: str) -> None:
    with pytest.raises(UserError, match=f"the metric 'x/y' computes {kind}.*expected a number"):
        MetricValues({'x': {'y': value}})


def test_duplicate_names_are_rejected() -> None:
    for one, two in [({'a/b': 1}, {'a': {'b': 2}}), ({'a': np.eye(2)}, {'a': 1})]:
        row = MetricValues(one)
        with pytest.raises(UserError, match='two values of a row of metrics are named'):
            row.update_with(MetricValues(two))


def test_means_over_members() -> None:
    members = [
        MetricValues({'loss': 1.0, 'counts': np.array([1, 2]), 'some': np.zeros(2)}),
        MetricValues({'loss': 2.0, 'counts': np.array([3, 2]), 'some': np.zeros(3)}),
    ]
    row = average_members(members)
    assert row == {'loss': 1.5, 'member_0/loss': 1.0, 'member_1/loss': 2.0}
    assert row.arrays['counts'].tolist() == [2, 2]
    assert row.arrays['member_1/counts'].tolist() == [3, 2]
    assert 'some' not in row.arrays
    assert row.arrays['member_1/some'].shape == (3,)
    # Means of the counted members, whatever values the others have.
    row = average_members(members, [1])
    assert row == {'loss': 2.0, 'member_0/loss': 1.0, 'member_1/loss': 2.0}
    assert row.arrays['counts'].tolist() == [3, 2]
    assert row.arrays['some'].shape == (3,)


@pytest.mark.parametrize(
    ('metric', 'found'), [(Share, {'x': 1.0}), (Absent, {'x': 1.0}), (OfTwo, None)]
)
def test_metric_may_fail_to_compute_without_data(metric: Any, found: Any) -> None:
    metrics = {'x': metric.empty()}
    check_computes(metrics)
    assert compute_on_trial(lambda tree: MetricValues({'x': tree['x'].compute()}), metrics) == found


@pytest.mark.parametrize(
    ('metric', 'message'),
    [
        (Broken, "'x' cannot be computed for any data: AttributeError: .*totl"),
        (Words, "'x/grade' computes str"),
        # clu 0.0.12 calls jnp.clip with argument names that JAX has removed.
        (clu.metrics.Std.from_output('loss'), "'x' cannot be computed for any data: TypeErr"),
    ],
)
def test_metric_that_fails_for_any_data_is_rejected(metric: Any, message: str) -> None:
    collection = clu.metrics.Collection.create(x=metric)
    with pytest.raises(UserError, match=message):
        check_computes({'task': jax.eval_shape(collection.empty)})


@pytest.mark.parametrize(
    ('metric', 'message'),
    [
        (Growing, r"'x' cannot accumulate on the devices: .*float32\[0\] -> float32\[1\]"),
    ],
)
def test_metric_that_changes_shape_is_rejected(metric: Any, message: str) -> None:
    collection = clu.metrics.Collection.create(x=metric)

    def measure(loss: jax.Array) -> Any:
        return collection.single_from_model_output(loss=loss, mask=jnp.ones(4, bool))

    with pytest.raises(UserError, match=message):
        check_accumulates(collection.empty(), jax.eval_shape(measure, jnp.ones(4)))
    sound = clu.metrics.Collection.create(x=Total, y=clu.metrics.Average.from_output('loss'))
    check_accumulates(sound.empty(), sound.single_from_model_output(loss=jnp.ones(4)))
