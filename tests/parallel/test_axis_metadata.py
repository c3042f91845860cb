# SPDX-License-Identifier: Apache-2.0
"""Boxes that name dimensions: those of Flax, of users, and of lifted transformations."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec as P

from tests.parallel.test_mesh import experiment
from trainer.trainer import Trainer

KERNEL = nn.initializers.lecun_normal()


@flax.struct.dataclass
class Labelled(meta.AxisMetadata):
    """A custom box: a value, and a label for each dimension."""

    value: Any
    labels: tuple[str | None, ...] = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> Labelled:
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Labelled:
        labels = list(self.labels)
        labels.insert(index, params.get('label'))
        return self.replace(labels=tuple(labels))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Labelled:
        labels = list(self.labels)
        assert labels.pop(index) == params.get('label')
        return self.replace(labels=tuple(labels))


class CustomBox(nn.Module):
    """Three scanned layers, whose kernels are in a custom box."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(*args: Any) -> Labelled:
            return Labelled(KERNEL(*args), ('rows', 'columns'))

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return nn.relu(x @ self.param('kernel', init, (64, 64))), None

        layers = nn.scan(
            Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3,
            metadata_params={'label': 'layers'},
        )  # fmt: skip
        x, _ = layers(name='layers')(x.reshape(len(x), -1)[:, :64], None)
        return nn.Dense(10)(x)


class Branches(nn.Module):
    """Four branches by `nn.vmap`, two on each device of the axis 'model'."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Branch(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                kernel = nn.with_partitioning(KERNEL, (None, None))
                y = nn.relu(nn.Dense(32, kernel_init=kernel, name='dense')(x))
                return jax.lax.with_sharding_constraint(y, P('data', None))

        branches = nn.vmap(
            Branch, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None,
            axis_size=4, spmd_axis_name='model', metadata_params={nn.PARTITION_NAME: 'model'},
        )  # fmt: skip
        return nn.Dense(10)(branches(name='branches')(x.reshape(len(x), -1)).mean(0))


def boxes() -> list[Any]:
    value = jnp.ones((8, 3))
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    return [
        nn.Partitioned(value, ('data', None)),
        nn.Partitioned(value, ('data', None), mesh=mesh),
        nn.LogicallyPartitioned(value, ('embed', 'mlp')),
        Labelled(value, ('rows', 'columns')),
    ]


@pytest.mark.parametrize('index', [0, 1, 2])
def test_an_axis_that_is_added_can_be_removed(index: int) -> None:
    """The two are inverse, and the value does not change."""
    for box in boxes():
        params = {nn.PARTITION_NAME: 'layers', 'label': 'layers'}
        grown = box.add_axis(index, params)
        names = grown.labels if isinstance(grown, Labelled) else grown.names
        assert len(names) == 3 and names[index] == 'layers'
        again = grown.remove_axis(index, params)
        assert (again.labels if isinstance(again, Labelled) else again.names) == (
            box.labels if isinstance(box, Labelled) else box.names
        )
        np.testing.assert_array_equal(again.unbox(), box.unbox())


@pytest.mark.slow
def test_training_with_a_custom_box(tmp_path: pathlib.Path) -> None:
    """Modules see the value; the state and the checkpoints contain no boxes."""
    trainer = Trainer(
        experiment(f'{__name__}:CustomBox', train_for='3 steps', checkpoint__every='3 steps'),
        str(tmp_path),
    )
    params = trainer.fit().state.params
    assert params['layers']['kernel'].shape == (3, 64, 64)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    assert not any(
        isinstance(x, meta.AxisMetadata)
        for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
    )
    restored = Trainer(trainer.experiment, str(tmp_path)).restore().params
    np.testing.assert_array_equal(restored['layers']['kernel'], params['layers']['kernel'])


@pytest.mark.slow
def test_branches_by_vmap_are_sharded() -> None:
    """The new dimension of parameters and of constrained activations has the mesh axis."""
    losses = {}
    for mesh in ({'data': 8, 'model': 1}, {'data': 4, 'model': 2}):
        options = {f'mesh__{name}': size for name, size in mesh.items()}
        trainer = Trainer(experiment(f'{__name__}:Branches', train_for='5 steps', **options))
        result = trainer.fit()
        kernel = result.state.params['branches']['dense']['kernel']
        assert kernel.sharding.spec[0] == 'model'
        assert {s.data.shape for s in kernel.addressable_shards} == {(4 // mesh['model'], 784, 32)}
        losses[mesh['model']] = result.metrics['train/loss']
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    compiled = trainer.set_up().programs.step.executable().as_text()
    found = re.findall(r'f32\[(\d+),(\d+),(\d+)\]', compiled)
    shapes = {tuple(sorted(map(int, dims))) for dims in found}
    # Of 4 branches and 32 rows a device computes 2 branches of 8 rows.
    assert (2, 8, 32) in shapes
    assert not {(4, 8, 32), (2, 32, 32), (4, 32, 32)} & shapes


def first_dimensions(shardings: Any) -> set[Any]:
    """Returns the mesh axes over which the examples are sharded."""
    return {next(iter(x.spec)) for x in jax.tree.leaves(shardings)}


@pytest.mark.slow
def test_batches_of_training_are_sharded_over_examples() -> None:
    """Inputs are sharded over the axis 'data'; the state keeps its sharding."""
    trainer = Trainer(experiment('cnn', mesh__data=8, train_for='1 steps'))
    with trainer.batches(0, [1]) as batches:
        batch = next(iter(batches)).arrays
    assert {s.data.shape[0] for s in batch['image'].addressable_shards} == {32 // 8}
    step = trainer.set_up().programs.step.executable()
    assert first_dimensions(step.input_shardings[0][1]) <= {'data', ('data',)}
    before = trainer.init_state()
    asked = jax.tree.map(lambda x: x.sharding, before)
    after = trainer.set_up().programs.step(before, batch)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(asked), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # Of 32 rows a device computes 4 logits of 10 classes, and none has all of them.
    text = step.as_text()
    assert 'f32[4,10]' in text and 'f32[32,10]' not in text


@pytest.mark.slow
def test_batches_of_evaluation_are_sharded_over_examples() -> None:
    """The same for evaluations, whose sums are replicated, and predictions."""
    test = {
        'source': {'target': 'trainer.data.mnist:MNIST', 'split': 'test', 'limit': 77},
        'device_transforms': ({'target': 'trainer.data.transforms:ToFloat'},),
        'batch_size': 56,
    }
    evals = {'test': {'data': test}}
    found = {}
    for shards in (8, 1):
        mesh = {'data': shards, 'model': 8 // shards}
        trainer = Trainer(experiment('cnn', mesh=mesh, train_for='1 steps', evals=evals))
        state, evaluator = trainer.init_state(), trainer.set_up().evaluators['test']
        metrics = evaluator.run(state)
        assert metrics['examples'] == 77
        (step,) = (program.executable() for program in evaluator._programs.values())
        batch = step.input_shardings[0][-1]
        assert first_dimensions(batch) <= {'data', ('data',)}
        assert all(x.is_fully_replicated for x in jax.tree.leaves(step.output_shardings))
        # Logits of its own rows.
        assert f'f32[{56 // shards},10]' in step.as_text()
        assert ('f32[56,10]' in step.as_text()) == (shards == 1)
        parts = list(evaluator.predict(state))
        found[shards] = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        assert all(len(rows) == 77 for rows in found[shards].values())
    for name, rows in found[8].items():
        np.testing.assert_allclose(rows, found[1][name], rtol=1e-5, atol=1e-6)
