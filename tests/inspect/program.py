# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program, to compare two programs."""

from __future__ import annotations

import re

import jax

_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')


def computation(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised program without its source locations."""
    parts = compiled.as_text().split('\n\n')
    kept = [part for part in parts if not part.lstrip().startswith(_TABLES)]
    return re.sub(r', metadata=\{[^}]*\}', '', '\n\n'.join(kept))
