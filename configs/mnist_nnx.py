# SPDX-License-Identifier: Apache-2.0
"""The CNN of the Flax quickstart on MNIST, written with NNX.

    python -m trainer.main --config=configs/mnist_nnx.py

Expected after 10 epochs: 99.0 % of all 10,000 test examples; 4 minutes on two CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '10 epochs'

    # A class: the run calls it with `rngs`, which depend on `config.seed`.
    config.model = dict(target='trainer.models.cnn_nnx:CNN', num_classes=10)
    config.task = dict(target='trainer.tasks:Classification')
    config.optimizer = dict(target='optax:sgd', learning_rate=0.01, momentum=0.9)

    to_float = dict(target='trainer.data.transforms:ToFloat', key='image')
    config.data = dict(
        source=dict(target='trainer.data.mnist:MNIST', split='train'),
        device_transforms=(to_float,),
        batch_size=32,
    )
    config.evals = dict(
        test=dict(
            every='1 epoch',
            data=dict(
                source=dict(target='trainer.data.mnist:MNIST', split='test'),
                device_transforms=(to_float,),
                batch_size=512,
            ),
        ),
    )

    config.checkpoint = dict(every='1 epoch', keep_last=2)
    config.log = dict(every='100 steps')
    return config
