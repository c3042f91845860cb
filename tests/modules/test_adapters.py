# SPDX-License-Identifier: Apache-2.0
"""Adapters: support for a kind of Linen modules that `trainer.modules` does not know."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from trainer.config.errors import UserError
from trainer.modules import adapters
from trainer.modules.adapters import Adapter
from trainer.modules.functional import as_functional
from trainer.modules.rng import Keys

X = jnp.ones((2, 3))


class Kind(nn.Module):
    """A kind of modules that stores its outputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x)


class Unusable(Kind):
    """A module of this kind that cannot be the model of a config."""


def keep(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    output = next_fun(*args, **kwargs)
    if isinstance(context.module, Kind) and context.module.is_mutable_collection('intermediates'):
        context.module.put_variable('intermediates', 'kept', (output, 'a text'))
    return output


def plain(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[0] for name, value in intermediates.items()}


def refusal(module: object) -> str | None:
    return 'no run can start from it' if isinstance(module, Unusable) else None


def test_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets each method of each module, the intermediates of a call, and a config's model."""
    monkeypatch.setattr(adapters, 'registered', [])
    adapter = Adapter(intercept=keep, plain=plain, refusal=refusal)
    model = as_functional(Kind())
    keys = Keys(seed=0, mode='eval')
    variables = model.init(lambda bound, batch: bound(batch['x']), {'x': X}, keys)
    assert as_functional(Unusable())
    for times in range(2):  # To register it again changes nothing.
        adapters.register(adapter)
        assert adapters.registered == [adapter], times
    bound = model.bind(variables, keys)
    y = bound(X)
    assert bound.intermediates.keys() == {'kept'}
    assert (bound.intermediates['kept'] == y).all()
    with pytest.raises(UserError, match=r'^config\.model: no run can start from it$'):
        as_functional(Unusable())


@pytest.mark.slow
def test_linen_models_do_not_import_klinen() -> None:
    """A run without Klinen modules does not pay for Klinen."""
    code = (
        'import sys, flax.linen as nn, trainer.experiment, trainer.trainer\n'
        'from trainer.modules import adapters\n'
        'from trainer.modules.functional import as_functional\n'
        'as_functional(nn.Dense(3))\n'
        'assert not [name for name in sys.modules if name.startswith("trainer.klinen")]\n'
        'assert adapters.registered == []\n'
        'import trainer.klinen\n'
        'assert len(adapters.registered) == 1\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_the_package_imports_nothing() -> None:
    """Importing one file of `trainer.modules` does not import the others."""
    code = (
        'import sys, trainer.modules\nassert "jax" not in sys.modules and "flax" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
