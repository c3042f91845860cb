# SPDX-License-Identifier: Apache-2.0
"""Transforms of a batch in the compiled step, for `config.data.device_transforms`."""

from trainer.tasks.device_transforms import Mixup, Resize

__all__ = ['Mixup', 'Resize']
