# SPDX-License-Identifier: Apache-2.0
"""The RNG streams that a Linen module uses, found as it asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import errors

from trainer import compat


@dataclasses.dataclass(eq=False)
class Streams:
    """The RNG streams of a module, found as it asks for them.

    Attributes:
        names: the streams known so far.
        never: streams that it must not use.
    """

    names: set[str]
    never: frozenset[str] = frozenset()

    def learn(self, error: errors.InvalidRngError) -> None:
        """Adds the stream that a call of the module has asked for and had no key of.

        Raises:
            flax.errors.InvalidRngError: the same again, if it is of a stream that the module must
                not ask for, or of none.
        """
        name = compat.missing_stream(error)
        if name is None or name in self.names | self.never:
            raise error
        self.names.add(name)

    def run(
        self, function: Callable[[dict[str, jax.Array]], Any], key: Callable[[str], jax.Array]
    ) -> Any:
        """Returns `function(keys)` with a key for each stream that it asks for.

        Args:
            function: applies a module with these keys. It is pure, so it can start again when a
                stream turns up that is not known yet.
            key: makes the key of a stream.
        """
        while True:
            try:
                return function({name: key(name) for name in sorted(self.names)})
            except errors.InvalidRngError as error:
                self.learn(error)
