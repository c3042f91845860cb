# SPDX-License-Identifier: Apache-2.0
"""An ensemble of five small MLPs on MNIST, trained by one program.

    python -m trainer.main --config=configs/mnist_ensemble.py

Expected after 10 epochs: 97.96 % of all 10,000 test examples with the mean of the members'
probabilities, and 97.5 % for a member on average; 14 s on two CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '10 epochs'
    config.ensemble = dict(size=5)  # Member i trains like a run with seed 0 + i.

    config.model = dict(target='trainer.models.mlp:MLP', features=(64, 10))
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
