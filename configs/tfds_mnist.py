# SPDX-License-Identifier: Apache-2.0
"""The CNN of `configs/mnist.py`, on a dataset prepared by tensorflow-datasets.

    python -m trainer.main --config=configs/tfds_mnist.py

The dataset must have been prepared in a random-access format (docs/examples/tfds_mnist.md shows
how); it is read without TensorFlow. `--config.vars.name` is its name, and `--config.vars.data_dir`
the directory of datasets.

Expected after 10 epochs: 98.97 % of all 10,000 test examples, as with `configs/mnist.py`; 16
minutes on two busy CPU cores, 7 minutes of processor time.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_for = '10 epochs'
    config.vars = dict(name='mnist', data_dir='~/tensorflow_datasets')

    config.model = dict(target='trainer.models.cnn:CNN', num_classes=10)
    config.task = dict(target='trainer.tasks:Classification')
    config.optimizer = dict(target='optax:sgd', learning_rate=0.01, momentum=0.9)

    source = dict(
        target='trainer.data.tfds:TFDS',
        name=config.vars.get_ref('name'),
        data_dir=config.vars.get_ref('data_dir'),
        keys=('image', 'label'),  # A dataset may have more fields.
    )
    to_float = dict(target='trainer.data.transforms:ToFloat', key='image')
    config.data = dict(
        source=dict(source, split='train'), device_transforms=(to_float,), batch_size=32
    )
    config.evals = dict(
        test=dict(
            every='1 epoch',
            data=dict(
                source=dict(source, split='test'), device_transforms=(to_float,), batch_size=512
            ),
        ),
    )

    config.checkpoint = dict(every='1 epoch', keep_last=2)
    config.log = dict(every='100 steps')
    return config
