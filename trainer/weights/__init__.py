# SPDX-License-Identifier: Apache-2.0
"""Weights from other runs and frameworks: reading, converting, editing and loading them.

For configs: the operations of `config.surgery`, such as `trainer.weights:Rename`. For notebooks:
`restore` reads checkpoints without a config, and `operate` edits parameters and optimizer state.
"""

from trainer.weights import restore
from trainer.weights.stacking import Stack, Unstack
from trainer.weights.surgery import Edit, Interpolate, Operation, Rename, Resize, operate

__all__ = [
    'Edit',
    'Interpolate',
    'Operation',
    'Rename',
    'Resize',
    'Stack',
    'Unstack',
    'operate',
    'restore',
]
