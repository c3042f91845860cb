# SPDX-License-Identifier: Apache-2.0
"""The RNG streams that a Linen module uses, learned from its errors about missing keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import errors

from trainer import compat


@dataclasses.dataclass(eq=False)
class Streams:
    """The RNG streams that a module has requested so far.

    Attributes:
        names: the streams known so far.
        never: streams that the module must not use.
    """

    # Grows during the calls, because Flax cannot list the streams of a module.
    names: set[str]
    never: frozenset[str] = frozenset()

    def learn(self, error: errors.InvalidRngError) -> None:
        """Adds the stream whose missing key has caused an error.

        Raises:
            flax.errors.InvalidRngError: the same error, if it has another cause, or if the module
                must not use the stream.
        """
        name = compat.missing_stream(error)
        # A stream that is known had a key: raising stops an endless loop of repeated calls.
        if name is None or name in self.names | self.never:
            raise error
        self.names.add(name)

    def run(
        self, function: Callable[[dict[str, jax.Array]], Any], key: Callable[[str], jax.Array]
    ) -> Any:
        """Returns `function(keys)` with a key for each stream that it requests.

        Args:
            function: applies a module with these keys. It must be pure, because it is repeated when
                it requests a new stream.
            key: returns the key of a stream, by its name.
        """
        while True:
            try:
                return function({name: key(name) for name in sorted(self.names)})
            except errors.InvalidRngError as error:
                self.learn(error)
