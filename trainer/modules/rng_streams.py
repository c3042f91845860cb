# SPDX-License-Identifier: Apache-2.0
"""Which streams of random numbers a Linen module asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import errors

from trainer import compat


class Streams:
    """The streams of a module, learnt as it asks for them.

    Attributes:
        names: those known so far.
    """

    def __init__(self, known: set[str], never: frozenset[str] = frozenset()):
        """Starts with `known` names; to ask for one of `never` is an error."""
        self.names = set(known)
        self._never = never

    def run(
        self, function: Callable[[dict[str, jax.Array]], Any], key: Callable[[str], jax.Array]
    ) -> Any:
        """Returns `function(keys)` with a key for each stream that it asks for.

        Args:
            function: applies a module with these keys. It is pure, so it can start again when a
                stream turns up that is not known yet.
            key: makes the key of a stream.

        Raises:
            flax.errors.InvalidRngError: for a stream that must not be asked for.
        """
        while True:
            try:
                return function({name: key(name) for name in sorted(self.names)})
            except errors.InvalidRngError as error:
                name = compat.missing_stream(error)
                if name is None or name in self.names | self._never:
                    raise
                self.names.add(name)
