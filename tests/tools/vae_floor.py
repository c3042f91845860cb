# SPDX-License-Identifier: Apache-2.0
"""The floor of `configs/vae.py`: the loss of a model without latent variables, in nats per image.

    python tests/tools/vae_floor.py

Each pixel is white with a probability of its own: its frequency in the training images, as the
config binarizes them. The loss is that of the config's test images.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.experiment import load_and_build  # noqa: E402


def floor() -> float:
    """Returns the mean loss of the test images."""
    experiment = load_and_build(str(ROOT / 'configs' / 'vae.py'))
    evaluation = experiment.evals['test']
    train = _images(experiment.data, experiment.clock.batch_size)
    test = _images(evaluation.data(evaluation.batch_size, None), evaluation.batch_size)
    # As if each pixel had been seen once in each color: some have one color in all images.
    white = (train.sum(0) + 1) / (len(train) + 2)
    return float(-np.where(test, np.log(white), np.log(1 - white)).sum(1).mean())


def _images(data: Any, batch_size: int) -> np.ndarray:
    """Returns the images of one epoch, (examples, pixels)."""
    batches = -(-data.examples // batch_size)
    blocks = [data.block(i, 1).arrays['image'] for i in range(batches)]
    # The last batch has padding, or examples of the next epoch.
    return np.concatenate(blocks, axis=1).reshape(-1, 784)[: data.examples]


if __name__ == '__main__':
    print(f'{floor():.2f} nats per image')
