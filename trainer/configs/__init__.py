# SPDX-License-Identifier: Apache-2.0
"""Bundled configs, for a config that changes one: `from trainer.configs import mnist_mlp`.

Their files are in `configs/` of a checkout, and here in a wheel: see `trainer.config.bundled`.
"""

from trainer.config import bundled

__path__ = [str(bundled.FOLDER / 'configs')]
