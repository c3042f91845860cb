# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes, as text that two of them can be compared by."""

from __future__ import annotations

import re

import jax

_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')


def computation(compiled: jax.stages.Compiled) -> str:
    """Returns the optimised program without where its lines come from in the source."""
    parts = compiled.as_text().split('\n\n')
    kept = [part for part in parts if not part.lstrip().startswith(_TABLES)]
    return re.sub(r', metadata=\{[^}]*\}', '', '\n\n'.join(kept))
