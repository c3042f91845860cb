# SPDX-License-Identifier: Apache-2.0
"""Every public name of `optax` and `optax.contrib`: a config that trains with it, or why not.

`test_optax_table.py` runs the table, and fails for a name of a newer optax that is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from optax import contrib

from tests.step import tiny
from trainer.trainer import Trainer

HERE = __name__
SGD = {'target': 'optax:sgd', 'learning_rate': 0.05}
ADAM = {'target': 'optax:adam', 'learning_rate': 0.01}
KERNELS = {'ref': 'tests.step.perceptron:kernels'}
NORM = {'ref': 'optax.tree:norm'}


class One(nn.Module):
    """A dense layer: few arrays, so that each operation compiles once for all optimizers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name='dense')(x)


def trainer(optimizer: Mapping[str, Any], mesh: Any = None, **options: Any) -> Trainer:
    """Returns the trainer of a dense layer with an optimizer, on one device or a mesh."""
    one = jax.sharding.Mesh(jax.devices()[:1], ('data',))
    options = {'model': {'target': f'{HERE}:One'}, 'evals': {}, **options}
    made = tiny.trainer(optimizer=dict(optimizer), **options)
    return Trainer(made.experiment, mesh=one if mesh is None else mesh)


def chain(*parts: Any) -> dict[str, Any]:
    return {'target': 'optax:chain', 'args': parts}


def always(step: Any, *_: Any, **__: Any) -> Any:
    """The condition of transformations that have one."""
    return step >= 0


def half(updates: Any, params: Any = None) -> Any:
    """For `optax:stateless` and `optax:stateless_with_tree_map`."""
    del params
    return jax.tree.map(lambda g: 0.5 * g, updates)


def matrices(updates: Any) -> Any:
    """The dimensions of matrices for `optax.contrib:scale_by_muon`."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)


def same_arguments(module: str, names: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """Returns the configs of optimizers that take the same arguments."""
    return {name: {'target': f'{module}:{name}', **arguments} for name in names.split()}


def chains_with_sgd(
    module: str, names: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the configs of transformations of gradients: a chain of each and SGD."""
    return {
        name: chain({'target': f'{module}:{name}', **more}, SGD) for name, more in names.items()
    }


# Each of these trains.
OPTAX: dict[str, dict[str, Any]] = {
    **same_arguments(
        'optax',
        'adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb '
        'lars lion nadam nadamw noisy_sgd novograd optimistic_adam optimistic_adam_v2 '
        'optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi',
        learning_rate=0.01,
    ),
    'lbfgs': {'target': 'optax:lbfgs'},
    'polyak_sgd': {'target': 'optax:polyak_sgd'},
    'MultiSteps': {'target': 'optax:MultiSteps', 'opt': SGD, 'every_k_schedule': 2},
    **chains_with_sgd('optax', {
        'adaptive_grad_clip': {'clipping': 0.1},
        'add_decayed_weights': {'weight_decay': 0.01},
        'add_noise': {'eta': 0.01, 'gamma': 0.55, 'seed': 0},
        'apply_every': {'k': 1},
        'centralize': {},
        'clip': {'max_delta': 0.1},
        'clip_by_block_rms': {'threshold': 0.1},
        'clip_by_global_norm': {'max_norm': 0.1},
        'ema': {'decay': 0.9},
        'identity': {},
        'normalize_by_update_norm': {},
        'scale': {'step_size': 0.5},
        'scale_by_adadelta': {}, 'scale_by_adam': {}, 'scale_by_adamax': {}, 'scale_by_adan': {},
        'scale_by_amsgrad': {}, 'scale_by_belief': {}, 'scale_by_distance_over_gradients': {},
        'scale_by_factored_rms': {}, 'scale_by_lbfgs': {}, 'scale_by_lion': {},
        'scale_by_novograd': {}, 'scale_by_optimistic_gradient': {},
        'scale_by_param_block_norm': {}, 'scale_by_param_block_rms': {}, 'scale_by_polyak': {},
        'scale_by_radam': {}, 'scale_by_rms': {}, 'scale_by_rss': {}, 'scale_by_sign': {},
        'scale_by_sm3': {}, 'scale_by_stddev': {}, 'scale_by_trust_ratio': {},
        'scale_by_yogi': {},
        'snapshot': {'measure_name': 'norm', 'measure': NORM},
        'stateless': {'f': {'ref': f'{HERE}:half'}},
        'stateless_with_tree_map': {'f': {'ref': f'{HERE}:half'}},
        'trace': {'decay': 0.9},
        'zero_nans': {},
    }),
    'scale_by_rprop': chain(
        {'target': 'optax:scale_by_rprop', 'learning_rate': 0.01},
        {'target': 'optax:scale', 'step_size': -1.0},
    ),
    'scale_by_learning_rate': {'target': 'optax:scale_by_learning_rate', 'learning_rate': 0.05},
    'scale_by_schedule': chain(
        {'target': 'optax:scale_by_schedule',
         'step_size_fn': {'target': 'optax:constant_schedule', 'value': -0.05}},
    ),
    'scale_by_backtracking_linesearch': chain(
        SGD, {'target': 'optax:scale_by_backtracking_linesearch', 'max_backtracking_steps': 5}
    ),
    'scale_by_zoom_linesearch': chain(
        SGD, {'target': 'optax:scale_by_zoom_linesearch', 'max_linesearch_steps': 5}
    ),
    'keep_params_nonnegative': chain(SGD, {'target': 'optax:keep_params_nonnegative'}),
    'chain': chain(SGD),
    'named_chain': {'target': 'optax:named_chain', 'args': (('descent', SGD),)},
    'masked': {'target': 'optax:masked', 'inner': SGD, 'mask': KERNELS},
    'freeze': chain(SGD, {'target': 'optax:freeze', 'mask': KERNELS}),
    'set_to_zero': chain(
        SGD, {'target': 'optax:masked', 'inner': {'target': 'optax:set_to_zero'}, 'mask': KERNELS}
    ),
    'selective_transform': {
        'target': 'optax:selective_transform', 'optimizer': SGD,
        'freeze_mask': {'dense': {'kernel': True, 'bias': False}},
    },
    **{
        name: {'target': f'optax:{name}', 'transforms': {'kernel': SGD, 'bias': ADAM},
               'param_labels': {'ref': 'tests.step.perceptron:labels'}}
        for name in ('multi_transform', 'partition')
    },
    'apply_if_finite': {
        'target': 'optax:apply_if_finite', 'inner': SGD, 'max_consecutive_errors': 3,
    },
    **{
        name: {'target': f'optax:{name}', 'inner': SGD,
               'should_transform_fn': {'ref': f'{HERE}:always'}}
        for name in ('conditionally_mask', 'conditionally_transform')
    },
    'flatten': {'target': 'optax:flatten', 'inner': ADAM},
    'with_extra_args_support': {'target': 'optax:with_extra_args_support', 'tx': SGD},
}  # fmt: skip
CONTRIB: dict[str, dict[str, Any]] = {
    **same_arguments(
        'optax.contrib', 'acprop ademamix adopt madgrad simplified_ademamix sophia',
        learning_rate=0.01,
    ),
    **same_arguments('optax.contrib', 'cocob dadapt_adamw momo momo_adam prodigy dog dowg'),
    **same_arguments('optax.contrib', 'muon', learning_rate=0.01),
    **same_arguments('optax.contrib', 'galore', learning_rate=0.01, rank=2),
    'mechanize': {'target': 'optax.contrib:mechanize', 'base_optimizer': SGD},
    'sam': {'target': 'optax.contrib:sam', 'optimizer': ADAM, 'adv_optimizer': SGD},
    'schedule_free': {
        'target': 'optax.contrib:schedule_free', 'base_optimizer': SGD, 'learning_rate': 0.05,
    },
    **same_arguments('optax.contrib', 'schedule_free_adamw schedule_free_sgd', learning_rate=0.05),
    'split_real_and_imaginary': {'target': 'optax.contrib:split_real_and_imaginary', 'inner': SGD},
    'scale_by_muon': chain(
        {'target': 'optax:masked', 'mask': KERNELS, 'inner': {
            'target': 'optax.contrib:scale_by_muon',
            'weight_dimension_numbers': {'ref': f'{HERE}:matrices'}}},
        SGD,
    ),
    'reduce_on_plateau': chain(SGD, {'target': 'optax.contrib:reduce_on_plateau'}),
    **chains_with_sgd('optax.contrib', {
        'hutchinson_estimator_diag_hessian': {}, 'normalize': {},
        'scale_by_acprop': {}, 'scale_by_ademamix': {}, 'scale_by_adopt': {},
        'scale_by_cocob': {}, 'scale_by_galore': {'rank': 2},
        'scale_by_madgrad': {'learning_rate': 0.01},
        'scale_by_simplified_ademamix': {},
    }),
}  # fmt: skip
TRAINS = {'optax': OPTAX, 'optax.contrib': CONTRIB}

DPSGD = {'l2_norm_clip': 1.0, 'noise_multiplier': 0.1}
# Each of these is refused: its config, and what the message must say.
REFUSED: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    'optax': {
        'lookahead': (
            {'target': 'optax:lookahead', 'fast_optimizer': ADAM, 'sync_period': 5,
             'slow_step_size': 0.5},
            r'optax:lookahead needs two sets of parameters.*config\.ema',
        ),
        'inject_hyperparams': (
            {'target': 'optax:inject_hyperparams', 'inner_factory': {'ref': 'optax:adam'}},
            'It is not needed here: name the optimizer itself',
        ),
        'inject_stateful_hyperparams': (
            {'target': 'optax:inject_stateful_hyperparams', 'inner_factory': {'ref': 'optax:adam'}},
            'It is not needed here: name the optimizer itself',
        ),
        'monitor': (
            chain({'target': 'optax:monitor', 'measures': {'norm': NORM}}, SGD),
            r"structure of the optimizer's state changes.*use optax:snapshot",
        ),
        'measure_with_ema': (
            {'target': 'optax:measure_with_ema', 'measure': NORM, 'decay': 0.9},
            r'must return updates with the structure of the parameters.*optax:snapshot',
        ),
    },
    'optax.contrib': {
        'dpsgd': (
            {'target': 'optax.contrib:dpsgd', 'learning_rate': 0.1, 'seed': 0, **DPSGD},
            r'dpsgd.*needs a gradient of each example.*config\.step',
        ),
        'differentially_private_aggregate': (
            chain({'target': 'optax.contrib:differentially_private_aggregate', 'seed': 0, **DPSGD},
                  SGD),
            r'dpsgd.*needs a gradient of each example.*config\.step',
        ),
    },
}  # fmt: skip

# What is no optimizer and no part of one, by what it is. States and other tuples are left out.
OTHERS = {
    'schedules: learning_rate=dict(target=...)': """
        WrappedSchedule constant_schedule cosine_decay_schedule cosine_onecycle_schedule
        exponential_decay join_schedules linear_onecycle_schedule linear_schedule
        piecewise_constant_schedule piecewise_interpolate_schedule polynomial_schedule
        sgdr_schedule warmup_constant_schedule warmup_cosine_decay_schedule
        warmup_exponential_decay_schedule""",
    'losses, called in a task': """
        convex_kl_divergence cosine_distance cosine_similarity ctc_loss ctc_loss_with_forward_probs
        generalized_kl_divergence hinge_loss huber_loss kl_divergence l2_loss log_cosh nnls ntxent
        safe_softmax_cross_entropy sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
        softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error""",
    'types of annotations': """
        MaskOrFn OptState Params ScalarOrSchedule Schedule ShouldSkipUpdateFunction TransformInitFn
        TransformUpdateExtraArgsFn TransformUpdateFn Updates""",
    'functions of arrays, called in code': """
        apply_updates bias_correction global_norm incremental_update matrix_inverse_pth_root
        multi_normal per_example_global_norm_clip per_example_layer_norm_clip periodic_update
        power_iteration safe_increment safe_int32_increment safe_norm safe_root_mean_squares
        scale_gradient tree_map_params update_infinity_moment update_moment
        update_moment_per_elem_norm init_empty_state""",
    'for a loop of your own; here accumulate, and the value that line searches get': """
        microbatch value_and_grad_from_state""",
    'an argument of optax:MultiSteps: should_skip_update_fn': 'skip_large_updates skip_not_finite',
    'optimizer.eval_params': 'schedule_free_eval_params',
}
