# SPDX-License-Identifier: Apache-2.0
"""Starting from other weights: where they are read, how they are edited, where they go.

For a config: the operations of `config.surgery`, such as `trainer.weights:Rename`. For a notebook:
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
