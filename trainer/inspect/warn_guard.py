# SPDX-License-Identifier: Apache-2.0
"""`config.guard.non_finite='warn'`: reports once where a value is not finite, and continues."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from trainer.inspect.replay import Replay, ReplayStart
from trainer.parallel.host import fetch
from trainer.run.reporter import flat_row
from trainer.step.finite import all_finite
from trainer.step.state import TrainState


class WarnGuard:
    """Checks a run at each of its events, and reports the first non-finite value once."""

    def __init__(self, replay: Replay):
        """Creates a guard; call `keep` before `check`.

        Args:
            replay: reruns steps.
        """
        self._replay = replay
        self._last_finite: ReplayStart | None = None
        self._done = False
        self._all_finite = jax.jit(all_finite)

    def keep(self, step: int, state: TrainState) -> None:
        """Keeps a copy of a finite state, from which steps can be rerun."""
        self._last_finite = self._replay.keep(step, state)

    def check(self, step: int, state: TrainState, row: Mapping[str, float]) -> str | None:
        """Keeps the state if it is finite, otherwise explains where it first was not.

        Args:
            step: number of completed updates.
            state: train state after this step.
            row: the newest value of each metric, by flat name.

        Returns:
            A message for the user the first time that a value is not finite, otherwise None.
        """
        if self._done:
            return None
        # The row is on the host already; the state costs a wait.
        bad = non_finite_names(row)
        if not bad and self._is_finite(state):
            self.keep(step, state)
            return None
        self._done = True
        assert self._last_finite is not None
        what = f'{bad[0]} of step {step:,} is' if bad else f'a parameter after step {step:,} is'
        explained = self._replay.find(self._last_finite, step, self._is_bad)
        # Frees the copy: nothing is checked from here on.
        self._last_finite = None
        return f'config.guard: {what} not finite.\n{explained}\nTraining continues.'

    def _is_bad(self, state: TrainState) -> bool:
        return bool(non_finite_names(flat_row(state.metrics))) or not self._is_finite(state)

    def _is_finite(self, state: TrainState) -> bool:
        return bool(fetch(self._all_finite((state.params, state.collections))))


def non_finite_names(row: Mapping[str, float]) -> list[str]:
    """Returns the names of the losses and norms in a row that are not finite.

    With a loss scale, norms are ignored: a step with infinite gradients is skipped as intended.
    """
    watched = ('loss',) if 'train/loss_scale' in row else ('loss', '_norm')
    training = {name: value for name, value in row.items() if name.startswith('train/')}
    return [n for n, value in training.items() if n.endswith(watched) and not math.isfinite(value)]
