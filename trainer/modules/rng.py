# SPDX-License-Identifier: Apache-2.0
"""The rule that derives every random key of a run.

A key is a pure function of the run's seed and of where it is used. So the state contains no keys,
and a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import zlib

import jax

# Do not change: another number would give every seed other parameters and other dropout masks.
_MODES = {'init': 0, 'train': 1, 'eval': 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """The random keys of one step, evaluation batch or initialization.

    Attributes:
        seed: the seed of the run, or of a member of an ensemble; it may be traced.
        mode: 'init', 'train' or 'eval'.
        step: number of updates before this one; a traced scalar within a step.
        index: index of the micro-batch in training, of the batch in evaluation.
    """

    seed: int | jax.Array
    mode: str
    step: int | jax.Array = 0
    index: int | jax.Array = 0

    def stream(self, name: str) -> jax.Array:
        """Returns the scalar typed key of the RNG stream `name` ('dropout', 'noise', ...)."""
        # crc32 and not hash(), which Python salts differently in every process.
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
        key = jax.random.fold_in(key, _MODES[self.mode])
        # In turn, not as one number: no two pairs of step and index share a key.
        return jax.random.fold_in(jax.random.fold_in(key, self.step), self.index)
