# SPDX-License-Identifier: Apache-2.0
"""Sources, transforms and loaders in numpy; they know nothing of the trainer.

`trainer.data.mnist:MNIST` is one. Their files are in `data/` of a checkout, and here in a wheel:
see `trainer.config.bundled`.
"""

from trainer.config import bundled

__path__ = [str(bundled.FOLDER / 'data')]
