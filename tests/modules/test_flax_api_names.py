# SPDX-License-Identifier: Apache-2.0
"""Every name in Flax's API reference, or its successor, can be imported."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.training.early_stopping import EarlyStopping

from tests.modules.examples import X, bind

# Module to its names, as the reference lists them.
NAMES = {
    'flax.configurations': 'static_bool_env',
    'flax:config': 'update',
    'flax.core.frozen_dict': 'FrozenDict freeze unfreeze copy pop pretty_repr',
    'flax.core.frozen_dict:FrozenDict': 'copy pop pretty_repr unfreeze',
    'flax.errors': """
        AlreadyExistsError ApplyModuleInvalidMethodError ApplyScopeInvalidVariablesStructureError
        ApplyScopeInvalidVariablesTypeError AssignSubModuleError CallCompactUnboundModuleError
        CallSetupUnboundModuleError CallUnbindOnUnboundModuleError DescriptorAttributeError
        IncorrectPostInitOverrideError InvalidCheckpointError InvalidFilterError
        InvalidInstanceModuleError InvalidRngError InvalidScopeError JaxTransformError
        LazyInitError MPACheckpointingRequiredError MPARestoreDataCorruptedError
        MPARestoreTargetRequiredError ModifyScopeVariableError
        MultipleMethodsCompactError NameInUseError PartitioningUnspecifiedError
        ReservedModuleAttributeError ScopeCollectionNotFound ScopeParamNotFoundError
        ScopeParamShapeError ScopeVariableNotFoundError SetAttributeFrozenModuleError
        SetAttributeInModuleSetupError TransformTargetError TransformedMethodReturnValueError
    """,
    'flax.jax_utils': """
        partial_eval_by_shape replicate unreplicate prefetch_to_device pmean pad_shard_unpad
    """,
    'flax.linen': """
        Module apply init init_with_output Variable compact nowrap enable_named_call
        disable_named_call override_named_call tabulate vmap scan jit remat remat_scan map_variables
        jvp vjp custom_vjp while_loop cond switch Partitioned with_partitioning get_partition_spec
        get_sharding LogicallyPartitioned logical_axis_rules set_logical_axis_rules
        get_logical_axis_rules logical_to_mesh_axes logical_to_mesh logical_to_mesh_sharding
        with_logical_constraint with_logical_partitioning Dense DenseGeneral Conv ConvTranspose
        ConvLocal Embed BatchNorm LayerNorm GroupNorm max_pool avg_pool pool Sequential
        dot_product_attention_weights dot_product_attention make_attention_mask make_causal_mask
        SelfAttention MultiHeadDotProductAttention Dropout LSTMCell OptimizedLSTMCell GRUCell
        RNNCellBase RNN Bidirectional
    """,
    'flax.linen.activation': """
        PReLU celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu log_sigmoid
        log_softmax logsumexp one_hot relu relu6 selu sigmoid silu soft_sign softmax softplus
        standardize swish tanh
    """,
    'flax.linen.initializers': """
        constant delta_orthogonal glorot_normal glorot_uniform he_normal he_uniform kaiming_normal
        kaiming_uniform lecun_normal lecun_uniform normal ones ones_init orthogonal uniform
        variance_scaling xavier_normal xavier_uniform zeros zeros_init
    """,
    'flax.serialization': """
        from_state_dict to_state_dict register_serialization_state msgpack_serialize msgpack_restore
        to_bytes from_bytes
    """,
    'flax.struct': 'dataclass PyTreeNode',
    'flax.traceback_util': 'hide_flax_in_tracebacks show_flax_in_tracebacks',
    'flax.training.checkpoints': """
        save_checkpoint save_checkpoint_multiprocess latest_checkpoint restore_checkpoint
        convert_pre_linen
    """,
    'flax.training.lr_schedule': """
        create_constant_learning_rate_schedule create_stepped_learning_rate_schedule
        create_cosine_learning_rate_schedule
    """,
    'flax.training.train_state': 'TrainState',
    'flax.training.early_stopping': 'EarlyStopping',
    'flax.training.dynamic_scale': 'DynamicScale',
    'flax.training.common_utils': 'shard shard_prng_key stack_forest get_metrics onehot',
    'flax.traverse_util': """
        Traversal TraverseId TraverseMerge TraverseCompose TraverseFilter TraverseAttr TraverseItem
        TraverseEach TraverseTree flatten_dict unflatten_dict path_aware_map ModelParamTraversal
    """,
}

# Names in the documentation that were removed, with their successors.
GONE = {
    'flax:nn': 'flax:linen',
    'flax:optim': 'optax:sgd',
    'flax.configurations:define_bool_state': 'flax.configurations:bool_flag',
    'flax.errors:MPARestoreTypeNotMatchError': 'trainer.checkpoint.errors:CheckpointError',
    'flax.linen:Module.partial': 'functools:partial',
    'jax:tree_map': 'jax.tree:map',
    'jax.random:KeyArray': 'jax.random:key',
    'jax.experimental.pjit:with_sharding_constraint': 'jax.lax:with_sharding_constraint',
    'jax.experimental:maps': 'jax:set_mesh',
    'jax.experimental:gda_serialization': 'orbax.checkpoint:CheckpointManager',
    'jax.experimental:array': 'jax:Array',
    'jax.sharding:PositionalSharding': 'jax.sharding:NamedSharding',
    'jax.sharding:use_mesh': 'jax:set_mesh',
    'flax.nnx:Context': 'flax.nnx:Rngs',
    'flax.nnx:context': 'flax.nnx:Rngs',
    'flax.nnx:Node': 'flax.nnx:data',
    'flax.nnx:Sequence': 'flax.nnx:List',
    'flax.nnx:moduledef': 'flax.nnx:graphdef',
    'flax.nnx:PureModule': 'flax.nnx:call',
    'flax.nnx:Module.partition': 'flax.nnx:split',
    'flax.nnx:Module.update_state': 'flax.nnx:update',
    'flax.nnx:Module.pop_state': 'flax.nnx:pop',
    'flax.nnx:buffers': 'flax.nnx:state',
}

EVERY = [f'{module}:{name}' for module, names in NAMES.items() for name in names.split()]


def find(name: str) -> Any:
    """Imports the object 'package.module:Class.attribute'."""
    module, *attributes = name.split(':')
    path = '.'.join(attributes).split('.')
    return functools.reduce(getattr, path, importlib.import_module(module))


@pytest.mark.parametrize('name', EVERY)
def test_a_name_exists(name: str) -> None:
    assert find(name) is not None


@pytest.mark.parametrize('name', GONE)
def test_a_removed_name_has_a_successor(name: str) -> None:
    with pytest.raises((AttributeError, ImportError)):
        find(name)
    assert find(GONE[name]) is not None


def test_the_list_is_complete() -> None:
    """As many names as in the reference, except an error that Flax removed with its arrays."""
    assert len(NAMES['flax.errors'].split()) == 34 - 1
    assert len(NAMES['flax.linen.activation'].split()) == 25
    assert len(NAMES['flax.linen.initializers'].split()) == 20
    assert len(NAMES['flax.jax_utils'].split()) == 6


def test_variables_are_plain_dicts() -> None:
    """Neither frozen nor with a `pop` that returns a pair; `flax.core` has functions."""
    variables = nn.Dense(2).init(jax.random.key(0), np.ones((1, 3)))
    assert type(variables) is dict
    rest, params = flax.core.pop(variables, 'params')
    assert (rest, set(params)) == ({}, {'kernel', 'bias'})
    assert flax.core.copy(rest, {'params': params}) == variables
    assert flax.core.unfreeze(flax.core.freeze(rest)) == rest


def test_cells_know_their_features() -> None:
    """`RNN(cell, cell_size)` and `LSTMCell()` are gone, the features are the cell's."""
    with pytest.raises(TypeError):
        nn.LSTMCell()
    with pytest.raises(TypeError):
        nn.RNN(nn.LSTMCell(4), cell_size=4)
    with pytest.raises(TypeError):
        nn.LSTMCell.initialize_carry(jax.random.key(0), (2,), 4)
    cell = nn.LSTMCell(4)
    outputs, _ = nn.RNN(cell).init_with_output(jax.random.key(0), np.ones((2, 5, 3)))
    assert outputs.shape == (2, 5, 4)
    carry = cell.initialize_carry(jax.random.key(0), (2, 3))
    assert [x.shape for x in carry] == [(2, 4), (2, 4)]


def test_deprecated_names_still_work() -> None:
    """Self-attention and traversals warn, and equal their successors."""
    x, key = np.linspace(0.0, 1.0, 24, dtype='f4').reshape(2, 3, 4), jax.random.key(0)
    new, variables = nn.MultiHeadDotProductAttention(2).init_with_output(key, x)
    with pytest.warns(DeprecationWarning):
        old = nn.SelfAttention(2).apply(variables, x)
    np.testing.assert_array_equal(old, new)
    params = {'a': {'kernel': 1.0, 'bias': 2.0}}
    with pytest.warns(DeprecationWarning):
        biases = traverse_util.ModelParamTraversal(lambda path, _: path.endswith('bias'))
    changed = traverse_util.path_aware_map(
        lambda path, v: 10 * v if path[-1] == 'bias' else v, params
    )
    assert biases.update(lambda v: 10 * v, params) == changed == {'a': {'kernel': 1.0, 'bias': 20}}


class TwoCompacts(nn.Module):
    """Several compact methods, formerly an error."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name='one')(x)

    @nn.compact
    def other(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name='two')(x)


def test_several_compact_methods() -> None:
    """`MultipleMethodsCompactError` is never raised; a task may call both methods."""
    model = bind(TwoCompacts(), task=lambda model, batch: (model(batch['x']), model.other(X)))
    assert set(model.params) == {'one', 'two'}
    assert (model(X).shape, model.other(X).shape) == ((3, 2), (3, 3))


def test_an_update_of_early_stopping_is_an_object() -> None:
    """It has the values of the former pair."""
    found = [EarlyStopping(min_delta=0.1, patience=0).update(1.0)]
    for loss in (0.5, 0.45):
        found.append(found[-1].update(loss))
    assert [(x.has_improved, x.should_stop) for x in found] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_common_utilities() -> None:
    """What they do, and the global arrays that replace them here."""
    from flax import jax_utils
    from flax.training import common_utils

    batch = {'x': np.arange(16.0).reshape(16, 1)}
    assert common_utils.shard(batch)['x'].shape == (jax.local_device_count(), 2, 1)
    keys = common_utils.shard_prng_key(jax.random.PRNGKey(0))
    assert len({tuple(key) for key in np.asarray(keys)}) == jax.local_device_count()
    stacked = common_utils.stack_forest([{'a': 1}, {'a': 2}])
    assert stacked['a'].tolist() == [1, 2]
    steps = [jax_utils.replicate({'a': np.float32(x)}) for x in (1, 2)]
    found = common_utils.get_metrics(steps)
    assert found['a'].tolist() == [1.0, 2.0]
    hot = common_utils.onehot(np.array([2]), 3, on_value=0.9, off_value=0.05)
    np.testing.assert_allclose(hot, [[0.05, 0.05, 0.9]])
    np.testing.assert_allclose(optax.smooth_labels(jax.nn.one_hot(2, 3), 0.15), hot[0], rtol=1e-6)
    everywhere = jax_utils.replicate({'a': np.float32(3)})
    assert jax_utils.unreplicate(everywhere)['a'] == 3
    # Shapes alone, through a program that computes with one of them.
    (shape,) = jax_utils.partial_eval_by_shape(lambda x: (x.sum(0),), [((4, 3), np.float32)])
    assert shape.shape == (3,)


def test_prefetching_keeps_the_order() -> None:
    """Flax's iterator and ours give the same batches, ours as sharded global arrays."""
    from flax import jax_utils

    from trainer.input.prefetch import Prefetcher
    from trainer.parallel.mesh import make_mesh

    devices = jax.local_device_count()
    batches = [{'x': np.full((devices, 2), i, np.float32)} for i in range(5)]
    theirs = [np.asarray(batch['x']) for batch in jax_utils.prefetch_to_device(iter(batches), 2)]

    class Block:
        def __init__(self, start: int, count: int, rows: slice):
            assert rows == slice(None)
            read = [batches[i]['x'].reshape(-1) for i in range(start, start + count)]
            self.arrays = {'x': np.stack(read)}
            self.ids = np.zeros((count, 2 * devices), np.int64)
            self.states = None

    mesh = make_mesh({'data': -1})
    with Prefetcher(Block, [1] * 5, mesh, 2 * devices) as ours:
        found = [batch.arrays['x'] for batch in ours]
    assert all(x.sharding.is_equivalent_to(found[0].sharding, 1) for x in found)
    assert len(found[0].sharding.device_set) == devices
    for mine, his in zip(found, theirs, strict=True):
        assert np.array_equal(mine, his.reshape(-1))
