# SPDX-License-Identifier: Apache-2.0
"""Models: plain Flax modules that know nothing of the trainer. `trainer.models.cnn:CNN` is one.

Their files are in `models/` of a checkout, and here in a wheel: see `trainer.config.bundled`.
"""

from trainer.config import bundled

__path__ = [str(bundled.FOLDER / 'models')]
