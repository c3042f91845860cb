# SPDX-License-Identifier: Apache-2.0
"""Functions, classes and dtypes that a config gives by name, and messages for unknown ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest

from tests import command
from trainer.config import loading, overrides, targets
from trainer.config.errors import UserError


class Net(nn.Module):
    """Arguments of all kinds that take a function or a dtype."""

    activation: Callable[[jax.Array], jax.Array] = nn.relu
    unsaid: Any = nn.relu
    either: str | Callable[..., Any] = nn.relu
    maybe: Callable[..., Any] | None = None
    norm: Any = nn.LayerNorm
    init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    unsaid_init: Any = nn.initializers.zeros
    bias_init: Callable[..., Any] = nn.initializers.zeros
    dtype: Any = jnp.float32
    dtype_or_text: str | jnp.dtype = 'auto'
    dtype_or_number: jnp.dtype | int | None = None
    dtype_or_any: nn.dtypes.Dtype | None = None
    name_of_dtype: str = 'float32'
    part: nn.Module | None = None
    optimizer: optax.GradientTransformation | None = None


def instantiate_argument(name: str, value: Any) -> Any:
    node = {'target': f'{__name__}:Net', name: value}
    targets.check(node, 'config.model')
    return getattr(targets.instantiate(node, 'config.model'), name)


@pytest.mark.parametrize(
    ('name', 'value', 'expected'),
    [
        ('activation', 'gelu', nn.gelu),
        ('activation', 'jax.numpy:sin', jnp.sin),
        ('activation', {'ref': 'jax.numpy:sin'}, jnp.sin),
        ('unsaid', 'gelu', nn.gelu),
        ('unsaid', 'own word', 'own word'),
        ('either', 'gelu', 'gelu'),
        ('maybe', None, None),
        ('norm', 'RMSNorm', nn.RMSNorm),
        ('dtype', 'bfloat16', jnp.bfloat16),
        ('dtype', 'e', jnp.float16),
        ('dtype', 'jax.numpy:bfloat16', jnp.bfloat16),
        ('dtype_or_text', 'auto', 'auto'),
        ('dtype_or_number', 8, 8),
        ('dtype_or_any', 'bfloat16', 'bfloat16'),
        ('name_of_dtype', 'bf16', 'bf16'),
        ('part', False, False),
        ('maybe', False, False),
        ('bias_init', 'ones', nn.initializers.ones),
        ('bias_init', 'flax.linen.initializers:ones', nn.initializers.ones),
        ('unsaid_init', 'ones', nn.initializers.ones),
        ('unsaid_init', 'own word', 'own word'),
    ],
)
def test_names_of_functions_and_dtypes(name: str, value: Any, expected: Any) -> None:
    assert (
        instantiate_argument(name, value) is expected
        or instantiate_argument(name, value) == expected
    )


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        (
            'activation',
            'gleu',
            r"a function such as jax\.nn:relu .*, got 'gleu'.*'glu' or",
        ),
        ('activation', 'jax.nn.gelu', "Did you mean 'gelu'"),
        ('activation', 'jax.nn:gleu', 'the module has no'),
        ('activation', 'sin', r"dict\(ref='jax\.numpy:sin'\); .*'\{\"ref\": \"jax\.numpy:sin\"\}'"),
        ('activation', 3, 'expected a function .*, got 3'),
        ('activation', {'target': 'jax.nn:gelu'}, r"itself, write dict\(ref='jax\.nn:gelu'\)"),
        ('maybe', 'mine', r"expected a function, got 'mine'.*dict\(ref='package\.module:name'\)"),
        ('norm', 'BatchNrom', r"expected a class .*Did you mean 'BatchNorm'"),
        ('init', 'lecun_normal', r"dict\(target='flax\.linen\.initializers:lecun_normal'\)"),
        ('init', 'zeros', r"dict\(ref='flax\.linen\.initializers:zeros'\)"),
        ('part', 'Dense', r"expected an object, got 'Dense'.*dict\(target='flax\.linen:Dense'"),
        ('part', 'mine', r"dict\(target='package\.module:name', \.\.\.\)"),
        ('optimizer', 'adam', r"expected an object, got 'adam'.*dict\(target='optax:adam', \.\."),
        ('dtype', 'bf16', "'bf16' is not a dtype. Did you mean 'bfloat16'"),
        ('dtype', 'f16', "'f16' is not a dtype. Did you mean 'float16'"),
        ('dtype', 'fp16', "'fp16' is not a dtype. Did you mean 'float16'"),
        ('dtype', 'fp8', "'fp8' is not a dtype. Did you mean 'float8_e4m3fn'"),
        ('dtype', 'jnp.bfloat16', "Did you mean 'bfloat16'"),
        ('dtype', 'jax.numpy:sin', "'jax.numpy:sin' is not a dtype. Write 'bfloat16'"),
        ('dtype', 'O', "'O' is not a dtype"),
        ('dtype', 3, "expected a dtype such as 'bfloat16', got 3"),
        ('dtype_or_any', 'fp16', "'fp16' is not a dtype. Did you mean 'float16'"),
        ('part', 3, 'expected an object, got 3'),
        ('bias_init', 'relu', "expected an initializer, got 'relu'"),
        ('unsaid_init', 'relu', "expected an initializer, got 'relu'"),
        ('init', 'relu', r"got 'relu'.*dict\(target='flax\.linen\.initializers:lecun_normal'\)"),
        ('bias_init', 'normal', r"dict\(target='flax\.linen\.initializers:normal'\)"),
        ('unsaid_init', 'normal', r"dict\(target='flax\.linen\.initializers:normal'\)"),
        ('init', 'lecun_norml', r"mean 'lecun_normal'.*target='flax\.linen\.initializers:lecun"),
        ('bias_init', 'zero', r"Did you mean 'zeros'\?"),
    ],
)
def test_unknown_names(name: str, value: Any, message: str) -> None:
    for check in (targets.check, targets.instantiate):
        with pytest.raises(UserError, match=rf'config\.model\.{name}.*: .*{message}'):
            check({'target': f'{__name__}:Net', name: value}, 'config.model')


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('adam', 'optax:adam'), ('Regression', 'trainer.tasks:Regression')],
)
def test_targets_without_a_module(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"got '{name}'\. Did you mean {expected}\?"):
        targets.check({'target': name}, 'config.x')


def test_a_name_in_place_of_an_object() -> None:
    assert override_value('model.activation', 'gelu') == {'ref': 'flax.linen:gelu'}
    assert override_value('model.activation', 'jax.numpy:sin') == {'ref': 'jax.numpy:sin'}
    with pytest.raises(UserError, match=r'optax:constant_schedule now.*--config\.optimizer\.lear'):
        override_value('optimizer.learning_rate', 'linear')
    with pytest.raises(UserError, match=r"got 'cosine'\. A schedule is an object, as in"):
        override_value('optimizer.learning_rate', 'cosine', learning_rate=0.1)


def override_value(path: str, text: str, **changes: Any) -> Any:
    """Returns the value at a path after an override."""
    rate = {'target': 'optax:constant_schedule', 'value': 1.0}
    config = ml_collections.ConfigDict(
        {
            'model': {'target': 'trainer.models.mlp:MLP', 'activation': {'ref': 'flax.linen:relu'}},
            'optimizer': {'target': 'optax:sgd', 'learning_rate': rate, **changes},
        }
    )
    overrides.apply(config, [(path, text)])
    section, key = path.split('.')
    return loading.to_plain(config)[section][key]


@pytest.mark.slow
def test_names_on_the_command_line() -> None:
    done = command.run(command.MLP, '--config.model.activation=gelu', '--mode=summary')
    assert done.code == 0, done.err
    done = command.run(command.MLP, '--config.model.activation=gleu', '--mode=summary')
    assert (done.code, done.err.count('\n')) == (2, 1)
    assert 'config.model.activation: expected a function' in done.err
