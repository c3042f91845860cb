# SPDX-License-Identifier: Apache-2.0
"""Checkpoint metadata: an Orbax JSON item whose digest is computed during the save."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from trainer import compat


class MetaHandler(ocp.JsonCheckpointHandler):
    """Writes JSON like Orbax's handler, but computes the digest in the background thread."""

    async def async_save(
        self, directory: epath.Path, item: Any = None, args: MetaSave | None = None
    ) -> list[future.Future]:
        """Returns the future of the write; the training thread does not wait for the digest.

        Raises:
            ValueError: without `args`.
        """
        if args is None:
            raise ValueError('MetaHandler saves MetaSave arguments only')

        async def write() -> None:
            text = json.dumps({**args.meta, 'digest': args.digest()})
            if jax.process_index() == 0:
                (directory / 'metadata').write_text(text)

        # Orbax commits the step after all futures, so no committed checkpoint lacks its metadata.
        return [compat.commit_future(write(), 'meta_save')]


@ocp.args.register_with_handler(MetaHandler, for_save=True)
@dataclasses.dataclass
class MetaSave(ocp.args.CheckpointArgs):
    """Arguments of a save.

    Attributes:
        meta: JSON values.
        digest: returns the state's digest; called once, in the background.
    """

    meta: Mapping[str, Any]
    digest: Callable[[], str]


@ocp.args.register_with_handler(MetaHandler, for_restore=True)
@dataclasses.dataclass
class MetaRestore(ocp.args.CheckpointArgs):
    """Arguments of a restore: none, but Orbax requires the class."""
