# SPDX-License-Identifier: Apache-2.0
"""The rule that derives every random key of a run.

A key is a pure function of the run's seed and of where it is used, so nothing random is stored in
the state, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import dataclasses
import zlib

import jax

# Fixed numbers, not an enum's order: they are part of what a seed means.
_MODES = {'init': 0, 'train': 1, 'eval': 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """The random keys of one step, evaluation batch or initialization.

    Attributes:
        seed: the run's seed; for a member of an ensemble, its own, which may be traced.
        mode: 'init', 'train' or 'eval'.
        step: number of updates before this one; a traced scalar inside a step.
        index: micro-batch in training, batch number in evaluation.
    """

    seed: int | jax.Array
    mode: str
    step: int | jax.Array = 0
    index: int | jax.Array = 0

    def stream(self, name: str) -> jax.Array:
        """Returns the scalar typed key of the RNG stream `name` ('dropout', 'noise', ...)."""
        # crc32 and not hash(), which Python salts in every process.
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))
        key = jax.random.fold_in(key, _MODES[self.mode])
        return jax.random.fold_in(jax.random.fold_in(key, self.step), self.index)
