# SPDX-License-Identifier: Apache-2.0
"""The parameter table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainer.models.cnn import CNN
from trainer.observe.table import count, human_bytes, nbytes, parameter_table


def test_the_table_of_a_cnn_from_shapes_alone() -> None:
    images = jnp.zeros((1, 28, 28, 1))
    variables = jax.eval_shape(CNN(num_classes=10).init, jax.random.key(0), images)
    lines = parameter_table(variables['params'], {}).splitlines()
    assert lines[0].split() == ['parameter', 'shape', 'dtype', 'size', 'bytes']
    assert lines[-1] == '824,458 parameters, 3.3 MB'
    kernel = next(line for line in lines if line.startswith('Dense_0/kernel'))
    assert kernel.split('  ')[-2:] == ['802,816', '3,211,264']
    assert '3136 x 256' in kernel and 'float32' in kernel
    # Numbers end in the same column.
    assert len({len(line) for line in lines[:-1]}) == 1


def test_other_collections_show_their_totals() -> None:
    params = {'scale': jnp.zeros((), jnp.bfloat16)}
    stats = {'mean': jnp.zeros(600), 'var': jnp.zeros(600)}
    assert parameter_table(params, {'batch_stats': stats}).splitlines() == [
        'parameter  shape   dtype     size  bytes',
        'scale      scalar  bfloat16     1      2',
        '1 parameters, 2 B',
        'batch_stats: 1,200 values, 4.8 kB',
    ]


def test_sharded_parameters_show_their_mesh_axes() -> None:
    mesh = jax.make_mesh((4, 2), ('data', 'model'))

    def split(*spec: str | tuple[str, ...] | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)

    params = {
        'bias': split(),
        'columns': split(None, 'model'),
        'rows': split(('data', 'model')),
        'trivial': jnp.zeros(3),
    }
    lines = parameter_table(params, {}).splitlines()
    assert lines[0].endswith('per device  axes')
    assert lines[1].split()[-2:] == ['256', '256']
    assert lines[2].split()[-5:] == ['256', '128', '-', 'x', 'model']
    assert lines[3].endswith(' 32  data+model x -')
    assert lines[4].split()[-2:] == ['12', '12']
    assert lines[5] == '195 parameters, 780 B, 428 B per device'
    whole = parameter_table({'bias': split()}, {})
    assert 'axes' not in whole


def test_counts_are_those_of_the_whole_array() -> None:
    tree = {'a': jnp.zeros((3, 4), jnp.float16), 'b': [jnp.zeros((), jnp.int8)]}
    assert count(tree) == 13
    assert nbytes(tree) == 25


@pytest.mark.parametrize(
    ('size', 'text'),
    [
        (0, '0 B'),
        (999, '999 B'),
        (1000, '1.0 kB'),
        (999_949, '999.9 kB'),
        (999_951, '1.0 MB'),
        (3_297_832, '3.3 MB'),
        (96e9, '96.0 GB'),
        (1.5e15, '1500.0 TB'),
    ],
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_blocks_are_sorted_by_number_and_repeats_share_a_line() -> None:
    layers = {f'layer_{i}': {'bias': jnp.zeros(i // 11 + 1)} for i in range(12)}
    lines = parameter_table(layers, {}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ['layer_0..10/bias', '1', 'float32', '11', 'x', '1', '11', 'x', '4'],
        ['layer_11/bias', '2', 'float32', '2', '8'],
        ['13', 'parameters,', '52', 'B'],
    ]
